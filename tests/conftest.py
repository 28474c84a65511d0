"""What every test runs under: eight CPU devices, strict broadcasting, no network, one compile
cache."""

import functools
import os

import hypothesis
import jax
import jaxtyping
import pytest

# Every annotation is checked at every call, shapes too, but not in processes that tests start.
if not os.environ.get("PGPO_JAX_UNCHECKED"):
    # An int is a float, as for every type checker.
    conf = "beartype.BeartypeConf(is_pep484_tower=True)"
    jaxtyping.install_import_hook("pgpo_jax", f"beartype.beartype(conf={conf})")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first call of a jitted function compiles it, so a deadline per example means nothing.
# The same examples on every machine: a failure is repeated by running the test again.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("default")

# Most of the time would be the compiler's, for models of a few thousand parameters: these make its
# work a quarter. What the programs compute stays; the quickstart's tests run without them.
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def pytest_configure(config: pytest.Config) -> None:
    """Points the caches of jax and Hugging Face into pytest's own, before any test imports them."""
    assert config.cache is not None
    os.environ["HF_HOME"] = str(config.cache.mkdir("huggingface"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Where torch is absent, the first import of transformers says so on stderr, in whichever test.
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    # In the environment too, for the commands that tests start as processes of their own.
    compilations = str(config.cache.mkdir("jax"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compilations
    jax.config.update("jax_compilation_cache_dir", compilations)
    # Small programs too: a test's second run, and its second process, find the first one's.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK_TO_COMPILE]).strip()


@pytest.fixture
def unchecked(monkeypatch):
    """Annotations are not checked: what they rule out, the package itself must refuse."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """`refused(expected, "train", *arguments)`: the command says this one line and exits with 2.

    The test runs in a folder of its own, where a reward function may lie.
    """
    from refusal import assert_refused

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return functools.partial(assert_refused, capsys, tmp_path)
