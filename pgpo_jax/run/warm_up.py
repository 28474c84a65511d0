"""The warm start of a run: its supervised steps, saved, stopped by a signal and gone on with."""

from typing import Any

import jax

from pgpo_jax.checkpoint import Checkpoints
from pgpo_jax.errors import RunError
from pgpo_jax.run.session import Session
from pgpo_jax.run.setup import Run, warm_start_folder
from pgpo_jax.warm_start import Supervised, begin, warm_start


def warm_up(run: Run, session: Session) -> Any:
    """The student after the warm start; None where a signal ended it, whose state is saved then.

    Its checkpoints lie beside those of the run, until the first of these is there.

    Raises:
      InputError: What `warm_start` raises; data or model changed since it was stopped.
      RunError: The state could not be saved at the signal.
    """
    config, saving = run.config.warm_start, run.config.checkpoint
    folder, writer = warm_start_folder(run.config), session.writer
    with Checkpoints(folder, keep=saving.keep, on_failure=saving.on_failure) as checkpoints:
        now = begun = _begin(run, session, checkpoints)
        writer.begin("warm start", now.steps, config.steps)
        policy, seed = run.policy, run.config.seed
        for now in warm_start(policy, begun, run.task, config, run.reprompt, seed):
            row = {} if now.loss is None else {"loss": float(now.loss)}  # waits for the step
            writer.progress("warm start", now.steps, config.steps, row)
            stops = now.steps < config.steps and session.stopping()
            if stops or (config.save_every and now.steps % config.save_every == 0):
                counted = {"left_out": now.left_out, "longest": now.longest}
                checkpoints.save(now.steps, now.state, {**session.origin, **counted})
            if stops:
                checkpoints.wait()
                if checkpoints.latest_step() != now.steps:
                    raise RunError(f"checkpoints: {folder} lacks supervised step {now.steps}")
                writer.say(
                    f"stopped at step 0, after {now.steps} of {config.steps} supervised steps: "
                    f"{run.config.output_dir}"
                )
                return None
    if now.left_out:
        count = config.steps * config.examples_per_step
        text = (
            f"{now.left_out:,} of {count:,} worked examples were left out: their prompts have more "
            f"than reprompt.max_length = {run.reprompt.max_length} tokens, the longest "
            f"{now.longest:,}"
        )
        writer.write(0, {"warm_start/left_out": float(now.left_out)}, [text])
    return now.state.student


def _begin(run: Run, session: Session, checkpoints: Checkpoints) -> Supervised:
    """Where the warm start stands: at its beginning, or at the newest checkpoint of its own."""
    fresh = begin(run.config.warm_start, run.params)
    if checkpoints.latest_step() is None:
        return fresh
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh.state
    )
    jax.tree.map(lambda x: x.delete(), fresh.state)  # room for what is restored
    state, saved = checkpoints.restore(like)
    changes, steps = session.check_origin(saved), int(saved["step"])
    told = f" (changed: {', '.join(changes)})" if changes else ""
    session.writer.say(f"resumed after {steps} supervised steps{told}")
    return Supervised(steps, state, None, int(saved["left_out"]), int(saved["longest"]))
