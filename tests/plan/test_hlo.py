"""The reading of compiled modules: on modules written by hand, and on ones that XLA compiled."""

import jax
import jax.numpy as jnp
import pytest

from pgpo_jax.plan import hlo, hlo_cost, live

HEADER = "HloModule m, is_scheduled=true\n\n"
LOOP = """
%body (p: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %p = (s32[], f32[64,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(STEP)
  %next = s32[] add(%i, %one)
  %x = f32[64,64]{1,0} get-tuple-element(%p), index=1
  %y = f32[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[64,64]{1,0}) tuple(%next, %y)
}

%condition (q: (s32[], f32[64,64])) -> pred[] {
  %q = (s32[], f32[64,64]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(END)
  ROOT %less = pred[] compare(%j, %end), direction=DIRECTION
}

ENTRY %main (x: f32[64,64]) -> f32[64,64] {
  %x0 = f32[64,64]{1,0} parameter(0)
  %start = s32[] constant(START)
  %state = (s32[], f32[64,64]{1,0}) tuple(%start, %x0)
  %loop = (s32[], f32[64,64]{1,0}) while(%state), condition=%condition, body=%body NOTE
  ROOT %r = f32[64,64]{1,0} get-tuple-element(%loop), index=1
}
"""
PRODUCT = 2 * 64**3


def loop(start=0, end=10, step=1, direction="LT", note=""):
    text = HEADER + LOOP
    values = {"START": start, "END": end, "STEP": step, "DIRECTION": direction, "NOTE": note}
    for name, value in values.items():
        text = text.replace(name, str(value))
    return text


def cost(text, unknown_trips=1):
    return hlo_cost.total(hlo_cost.operations(hlo.parse(text), unknown_trips))


def entry(*lines, computations=""):
    body = "\n".join("  " + line for line in lines)
    return f"{HEADER}{computations}\nENTRY %main () -> f32[] {{\n{body}\n}}\n"


def collective(line, operand="f32[8,128]{1,0}"):
    text = entry(f"%x = {operand} parameter(0)", f"ROOT {line}")
    return cost(text).collective_bytes


# ---- loops


@pytest.mark.parametrize(
    ("settings", "trips"),
    [
        ({}, 10),
        ({"start": 2, "end": 11, "step": 3}, 3),
        ({"end": 9, "direction": "LE"}, 10),
        ({"end": 0}, 0),
        ({"direction": "NE"}, 1),  # not understood: once
        ({"note": ', backend_config={"known_trip_count":{"n":"7"}}'}, 7),
        ({"note": ', backend_config={"known_trip_count": {"n": "7"}}'}, 7),  # as for GPUs
    ],
)
def test_a_loop_counts_as_often_as_it_runs(settings, trips):
    assert cost(loop(**settings)).matrix_flops == trips * PRODUCT


def test_a_loop_whose_end_depends_on_data_counts_as_often_as_the_caller_says():
    text = loop(direction="NE")
    assert cost(text, unknown_trips=5).matrix_flops == 5 * PRODUCT
    assert [item.name for item in hlo_cost.open_loops(hlo.parse(text))] == ["next", "y"]
    assert hlo_cost.open_loops(hlo.parse(loop())) == []


def test_a_bound_that_travels_in_the_loops_state_is_found():
    text = loop().replace(
        "%end = s32[] constant(10)", "%end = s32[] get-tuple-element(%q), index=2"
    )
    text = text.replace("(s32[], f32[64,64]{1,0})", "(s32[], f32[64,64]{1,0}, s32[])")
    text = text.replace("tuple(%start, %x0)", "tuple(%start, %x0, %bound)")
    text = text.replace("%start = ", "%bound = s32[] constant(6)\n  %start = ")
    assert cost(text).matrix_flops == 6 * PRODUCT


def test_a_comparison_wrapped_in_a_fusion_is_found():
    wrapped = """%compares (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %inner = pred[] compare(%a, %b), direction=LT
}
"""
    text = loop().replace(
        "compare(%j, %end), direction=LT", "fusion(%j, %end), kind=kLoop, calls=%compares"
    )
    assert cost(text.replace("\n%body", wrapped + "\n%body", 1)).matrix_flops == 10 * PRODUCT


def scanned(unroll, remat):
    """A gradient through seven layers; all products of the backward pass are needed."""

    def layer(x, w):
        return jnp.tanh(x @ w), None

    def loss(ws, x):
        return jnp.sum(
            jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, ws, 7, unroll=unroll)[0] ** 2
        )

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((7, 64, 64), (8, 64))]
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()


def test_a_scanned_module_costs_what_the_unrolled_one_does():
    rolled, written_out = scanned(1, remat=False), scanned(7, remat=False)
    products = 3 * 7 * 2 * 8 * 64 * 64
    assert cost(rolled.as_text()).matrix_flops == products
    assert cost(written_out.as_text()).matrix_flops == products
    # XLA itself counts a body once, which is right where nothing is rolled up.
    assert cost(written_out.as_text()).flops == pytest.approx(
        written_out.cost_analysis()["flops"], rel=0.02
    )
    assert rolled.cost_analysis()["flops"] < products / 2


def test_what_is_computed_again_in_the_backward_pass_counts_again():
    forward = 7 * 2 * 8 * 64 * 64
    assert cost(scanned(1, remat=True).as_text()).matrix_flops == 4 * forward


def test_nested_loops_multiply():
    def program(x):
        def inner(x, _):
            return x @ x, None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=3)[0] + 1, None

        return jax.lax.scan(outer, x, length=5)[0]

    text = jax.jit(program).lower(jnp.zeros((64, 64))).compile().as_text()
    assert cost(text).matrix_flops == 15 * PRODUCT


def test_a_conditional_counts_its_dearest_branch():
    def program(x, yes):
        return jax.lax.cond(yes, lambda x: x @ x @ x, lambda x: x + 1, x)

    text = jax.jit(program).lower(jnp.zeros((64, 64)), True).compile().as_text()
    assert cost(text).matrix_flops == 2 * PRODUCT


# ---- products


@pytest.mark.parametrize(
    ("shapes", "attributes", "flops"),
    [
        # A plain product as TPUs write it.
        (("bf16[1024,256]", "bf16[256,128]", "bf16[1024,128]"), "dim_labels=bf_io->bf",
         2 * 1024 * 256 * 128),
        (("bf16[1024,256]", "bf16[1024,128]", "bf16[256,128]"), "dim_labels=fb_io->bf",
         2 * 1024 * 256 * 128),
        # Heads as a window: every output head meets one kernel head only.
        (("bf16[1024,256,1]", "bf16[256,2,128]", "bf16[1024,2,128]"),
         "window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
         2 * 1024 * 256 * 2 * 128),
        # Heads summed over.
        (("bf16[1024,2,128]", "bf16[2,128,256]", "bf16[1024,256,1]"),
         "window={size=2}, dim_labels=b0f_0io->bf0", 2 * 1024 * 2 * 128 * 256),
        # A batch dimension: a stride and gaps let every point meet one kernel.
        (("f32[8,16,32]", "f32[8,32,64]", "f32[8,16,64]"),
         "window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
         2 * 8 * 16 * 32 * 64),
    ],
)  # fmt: skip
def test_products_written_as_convolutions_count_what_they_multiply(shapes, attributes, flops):
    left, right, out = shapes
    text = entry(
        f"%x = {left}{{1,0:T(8,128)}} parameter(0)",
        f"%y = {right}{{1,0}} parameter(1)",
        f"ROOT %z = {out}{{1,0}} convolution(%x, %y), {attributes}",
    )
    assert cost(text).matrix_flops == flops


def test_splash_attention_counts_the_blocks_that_its_mask_keeps():
    def kernel(name, table):
        return entry(
            f"%table = s8[{table}]{{2,1,0}} parameter(0)",
            "%q = bf16[4,1024,128]{2,1,0} parameter(1)",
            f"%{name} = (f32[512,128], bf16[4,1024,128]{{2,1,0}}) custom-call(%table, %q), "
            'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={',
            '"xprof_metadata":"{}"',
            '}}, backend_config={"custom_call_config":{"body":"TUzv="}}',
            "ROOT %done = f32[] constant(0)",
        )

    block = 2 * 4 * 512 * 512 * 128
    assert cost(kernel("splash_mha_fwd_residuals.2", "1,2,2")).matrix_flops == 2 * 3 * block
    assert cost(kernel("splash_mha_dkv_no_residuals.1", "1,2,2")).matrix_flops == 4 * 3 * block
    # A window of one block to a side keeps one of them in each row.
    assert cost(kernel("splash_mha_dq_no_residuals", "1,2,1")).matrix_flops == 3 * 2 * block


@pytest.mark.parametrize(
    ("target", "mask", "window", "pairs"),
    [
        ("__cudnn$fmhaSoftmax", "CAUSAL", 0, 2 * 256 * 257 // 2),
        ("__cudnn$fmhaSoftmaxBackward", "CAUSAL", 0, 5 * 256 * 257 // 2),
        ("__cudnn$fmhaSoftmax", "PADDING_CAUSAL", 64, 2 * (64 * 65 // 2 + 192 * 64)),
        ("__cudnn$fmhaSoftmax", "NO_MASK", 0, 2 * 256 * 256),
    ],
)
def test_attention_of_cudnn_counts_the_scores_that_its_mask_keeps(target, mask, window, pairs):
    text = entry(
        "%q = bf16[2,256,4,128]{3,2,1,0} parameter(0)",
        "%k = bf16[2,256,2,128]{3,2,1,0} parameter(1)",
        "%a.5 = (bf16[2,4,256,128]{3,1,2,0}, f32[2,4,256]{2,1,0}, u8[0]{0}) custom-call(%q, %k, "
        f'%k), custom_call_target="{target}", backend_config={{"operation_queue_id": "0", '
        '"cudnn_fmha_backend_config": {"algorithm": {"algo_id": "0", "tuning_knobs": {"17": "1"}}, '
        '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "256", '
        '"256"], "tuple_shapes": [], "layout": {"minor_to_major": ["3", "2", "1", "0"]}}, '
        f'"mask_type": "{mask}", "sliding_window_length": {window}, "max_seg_per_batch": 1}}}}',
        "ROOT %o = bf16[2,4,256,128]{3,1,2,0} get-tuple-element(%a.5), index=0",
    )
    found = cost(text)
    assert found.matrix_flops == found.attention_flops == 2 * 2 * 4 * pairs * 128
    sizes = 2 * 256 * 128 * 2  # of one head, in bytes
    assert found.bytes == (4 + 2 + 2 + 4) * sizes + 4 * 2 * 4 * 256


# ---- memory


def test_memory_on_the_chip_is_not_traffic():
    text = entry(
        "%x = f32[8,128]{1,0:T(8,128)} parameter(0)",
        "%y = f32[8,128]{1,0:T(8,128)S(1)} negate(%x)",
        "ROOT %z = bf16[8,128]{1,0:T(8,128)(2,1)} convert(%y)",
    )
    assert cost(text).bytes == 4 * 1024 + 2 * 1024


def test_a_fusion_that_reads_a_slice_and_updates_in_place_moves_only_these():
    fused = """
%fused (big: f32[100,64], new: f32[1,64], at: s32[]) -> f32[100,64] {
  %big = f32[100,64]{1,0} parameter(0)
  %new = f32[1,64]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  %old = f32[1,64]{1,0} dynamic-slice(%big, %at, %zero), dynamic_slice_sizes={1,64}
  %sum = f32[1,64]{1,0} add(%old, %new)
  ROOT %out = f32[100,64]{1,0} dynamic-update-slice(%big, %sum, %at, %zero)
}
"""
    text = entry(
        "%b = f32[100,64]{1,0} parameter(0)",
        "%n = f32[1,64]{1,0} parameter(1)",
        "%i = s32[] parameter(2)",
        "ROOT %f = f32[100,64]{1,0} fusion(%b, %n, %i), kind=kLoop, calls=%fused",
        computations=fused,
    )
    assert cost(text).bytes == 3 * 256 + 4
    assert cost(text).flops == 64


@pytest.mark.parametrize(
    ("use", "read"),
    [
        ("multiply(%seen, %seen)", 4096),
        ("dynamic-slice(%seen, %zero, %zero), dynamic_slice_sizes={1,128}", 512),
    ],
)
def test_a_bitcast_wrapped_in_a_fusion_of_its_own_hides_nothing(use, read):
    shape = "f32[1,128]" if "slice" in use else "f32[8,128]"
    fused = f"""
%wrapped (w: f32[1024]) -> f32[8,128] {{
  %w = f32[1024]{{0}} parameter(0)
  ROOT %cast = f32[8,128]{{1,0}} bitcast(%w)
}}

%outer (v: f32[1024]) -> {shape} {{
  %v = f32[1024]{{0}} parameter(0)
  %zero = s32[] constant(0)
  %seen = f32[8,128]{{1,0}} fusion(%v), kind=kLoop, calls=%wrapped
  ROOT %out = {shape}{{1,0}} {use}
}}
"""
    text = entry(
        "%x = f32[1024]{0} parameter(0)",
        f"ROOT %f = {shape}{{1,0}} fusion(%x), kind=kLoop, calls=%outer",
        computations=fused,
    )
    assert cost(text).bytes == 2 * read


def test_a_gather_from_a_table_that_is_cast_in_the_same_fusion_reads_its_rows_only():
    fused = """
%fused (table: f32[1000,64], ids: s32[8,1]) -> bf16[8,64] {
  %table = f32[1000,64]{1,0} parameter(0)
  %ids = s32[8,1]{1,0} parameter(1)
  %cast = bf16[1000,64]{1,0} convert(%table)
  ROOT %rows = bf16[8,64]{1,0} gather(%cast, %ids), offset_dims={1}, slice_sizes={1,64}
}
"""
    text = entry(
        "%t = f32[1000,64]{1,0} parameter(0)",
        "%i = s32[8,1]{1,0} parameter(1)",
        "ROOT %f = bf16[8,64]{1,0} fusion(%t, %i), kind=kLoop, calls=%fused",
        computations=fused,
    )
    assert cost(text).bytes == 8 * 64 * (4 + 2) + 8 * 4


@pytest.mark.parametrize(
    ("use", "read"),
    [
        ("gather(%big, %ids), offset_dims={1}, slice_sizes={1,64}", 8 * 64 * 4),
        ("gather(%big, %ids), offset_dims={1}, slice_sizes={1,64}\n"
         "  %all = f32[] reduce(%big, %zero), dimensions={0,1}, to_apply=%add", 1000 * 64 * 4),
    ],
)  # fmt: skip
def test_a_gather_from_what_a_fusion_computes_reads_what_is_gathered(use, read):
    fused = f"""
%fused (x: f32[1000,64], ids: s32[8,1]) -> f32[8,64] {{
  %x = f32[1000,64]{{1,0}} parameter(0)
  %ids = s32[8,1]{{1,0}} parameter(1)
  %zero = f32[] constant(0)
  %floor = f32[1000,64]{{1,0}} broadcast(%zero), dimensions={{}}
  %big = f32[1000,64]{{1,0}} maximum(%x, %floor)
  %rows = f32[8,64]{{1,0}} {use}
  ROOT %out = f32[8,64]{{1,0}} negate(%rows)
}}
"""
    text = entry(
        "%t = f32[1000,64]{1,0} parameter(0)",
        "%i = s32[8,1]{1,0} parameter(1)",
        "ROOT %f = f32[8,64]{1,0} fusion(%t, %i), kind=kLoop, calls=%fused",
        computations=fused,
    )
    assert cost(text).bytes == read + 8 * 64 * 4 + 8 * 4


def test_an_asynchronous_copy_counts_once():
    text = entry(
        "%x = f32[8,128]{1,0} parameter(0)",
        "%s = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x)",
        "ROOT %d = f32[8,128]{1,0:S(1)} copy-done(%s)",
    )
    assert cost(text).bytes == 4 * 1024


# ---- collectives


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%add", 2),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,2,2]T(2,1,0), dimensions={0}", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a','b'}", 4),
        ("source_target_pairs={{0,1},{1,2},{2,0}}", 3),
        ("", 1),
    ],
)
def test_groups_are_read_in_every_notation(groups, size):
    assert hlo_cost.group_size(groups) == size


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("%g = f32[32,128]{1,0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}",
         {"all-gather": 3 * 4096}),
        ("%g = f32[8,128]{1,0} all-reduce(%x), replica_groups=[1,4]<=[4]",
         {"all-reduce": 2 * 3 * 1024}),
        ("%g = f32[2,128]{1,0} reduce-scatter(%x), replica_groups=[1,4]<=[4]",
         {"reduce-scatter": 3 * 1024}),
        ("%g = f32[8,128]{1,0} all-to-all(%x), replica_groups=[1,4]<=[4]",
         {"all-to-all": 3 * 1024}),
        ("%g = (f32[8,128], f32[8,128], u32[], u32[]) collective-permute-start(%x), "
         "source_target_pairs={{0,1},{1,0}}", {"collective-permute": 4096}),
        ("%g = f32[8,128]{1,0} collective-permute-done(%x)", {}),
    ],
)  # fmt: skip
def test_a_device_sends_what_a_ring_needs(line, sent):
    assert collective(line) == sent


def test_an_all_reduce_of_which_a_part_is_kept_is_a_reduce_scatter():
    inside = """
%all-reduce-scatter.3 (input: f32[8,128]) -> f32[2,128] {
  %input = f32[8,128]{1,0} parameter(0)
  %sum = f32[8,128]{1,0} all-reduce(%input), replica_groups=[1,4]<=[4], to_apply=%add
  %i = s32[] constant(0)
  ROOT %part = f32[2,128]{1,0} dynamic-slice(%sum, %i, %i), dynamic_slice_sizes={2,128}
}
"""
    text = entry(
        "%x = f32[8,128]{1,0} parameter(0)",
        "ROOT %f = f32[2,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3",
        computations=inside,
    )
    assert cost(text).collective_bytes == {"reduce-scatter": 3 * 1024}


GATHER = "f32[32,128]{1,0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}"
START = GATHER.replace("f32[32,128]{1,0}", "(f32[8,128], f32[32,128])").replace(
    "(%x)", "-start(%x)"
)


@pytest.mark.parametrize(
    ("lines", "exposed"),
    [
        ([f"%g = {GATHER}"], True),
        ([f"%s = {START}", "%d = f32[32,128]{1,0} all-gather-done(%s)"], True),
        ([f"%s = {START}", "%y = f32[8,128]{1,0} negate(%x)",
          "%d = f32[32,128]{1,0} all-gather-done(%s)"], False),
        ([f"%s = {START}", "%b = f32[1024]{0} bitcast(%x)",
          "%d = f32[32,128]{1,0} all-gather-done(%s)"], True),
    ],
)  # fmt: skip
def test_a_collective_is_exposed_where_nothing_runs_beside_it(lines, exposed):
    text = entry("%x = f32[8,128]{1,0} parameter(0)", *lines, "ROOT %r = f32[] constant(0)")
    items = hlo_cost.operations(hlo.parse(text))
    (found,) = (item for item in items if item.collective)
    assert (found.exposed, found.group, found.collective_bytes) == (exposed, 4, 3 * 4096)
    assert hlo_cost.total(items).flops == 1024 * (len(items) - 1)  # the end of one costs nothing


def test_a_collective_wrapped_in_an_asynchronous_computation_is_hidden_by_what_runs_beside_it():
    inside = f"""
%wrapped (x: f32[8,128]) -> f32[32,128] {{
  %x = f32[8,128]{{1,0}} parameter(0)
  ROOT %g = {GATHER}
}}
"""
    begin = "%s = ((f32[8,128]), f32[32,128], u32[]) async-start(%x), calls=%wrapped"
    end = "ROOT %d = f32[32,128]{1,0} async-done(%s)"
    between = "%y = f32[8,128]{1,0} negate(%x)"
    for lines, exposed in (((begin, end), True), ((begin, between, end), False)):
        text = entry("%x = f32[8,128]{1,0} parameter(0)", *lines, computations=inside)
        (found,) = (x for x in hlo_cost.operations(hlo.parse(text)) if x.collective)
        assert found.exposed == exposed


def test_collectives_that_xla_makes_are_found_in_a_compiled_module():
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=split)
    text = jax.jit(lambda x: x * 2, out_shardings=whole).lower(x).compile().as_text()
    assert cost(text).collective_bytes == {"all-gather": 3 * 16 * 64}
    text = jax.jit(lambda x: x.sum(0), out_shardings=whole).lower(x).compile().as_text()
    assert cost(text).collective_bytes == {"all-reduce": 2 * 64 * 4 * 3 // 4}


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty")


# ---- memory at once


def test_arrays_live_from_where_they_are_made_to_their_last_use():
    text = entry(
        "%x = f32[1024]{0} parameter(0)",  # an argument, not a temporary
        "%a = f32[1024]{0} negate(%x)",
        "%b = f32[2048]{0} concatenate(%a, %x), dimensions={0}",
        "%c = f32[512]{0} slice(%b), slice={[0:512]}",  # %a is gone
        "%t = (f32[512]{0}, f32[2048]{0}) tuple(%c, %b)",
        "%e = f32[512]{0} get-tuple-element(%t), index=0",
        "ROOT %r = f32[512]{0} negate(%e)",  # a result, not a temporary
    )
    found = live.peak(hlo.parse(text), lambda shape: str(shape.elements))
    assert found == {"1024": 4 * 1024, "2048": 4 * 2048}


def test_what_a_loop_carries_counts_once_and_what_its_body_makes_beside_it():
    def squares(text):
        found = live.peak(hlo.parse(text), lambda shape: "square" if shape.dims else "scalar")
        return found.get("square", 0)

    assert squares(loop()) == 0  # the carried array is the argument, and in the end the result
    text = (
        loop()
        .replace(
            "%x0 = f32[64,64]{1,0} parameter(0)",
            """%a0 = f32[64,64]{1,0} parameter(0)
  %x0 = f32[64,64]{1,0} negate(%a0)""",
        )
        .replace(
            "ROOT %r = f32[64,64]{1,0} get-tuple-element(%loop), index=1",
            """%l = f32[64,64]{1,0} get-tuple-element(%loop), index=1
  ROOT %r = f32[64,64]{1,0} negate(%l)""",
        )
    )
    assert squares(text) == 4 * 64 * 64


def test_the_memory_found_is_about_what_xla_says():
    def f(x, w):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.square(jax.lax.scan(layer, x, w)[0]).sum()

    x, w = jnp.zeros((256, 64)), jnp.zeros((6, 64, 64))
    compiled = jax.jit(jax.grad(f, argnums=1)).lower(x, w).compile()
    found = live.peak(hlo.parse(compiled.as_text()), lambda shape: "any")["any"]
    assert found == pytest.approx(compiled.memory_analysis().temp_size_in_bytes, rel=0.35)
