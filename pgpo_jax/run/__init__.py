"""What training needs around its loop: setup, folder, session, evaluation, discovery, records,
reactions."""

from pgpo_jax.run import reactions
from pgpo_jax.run.checks import check_siblings
from pgpo_jax.run.discovery import Models, run_discovery
from pgpo_jax.run.evaluation import Interrupted, evaluate_sets
from pgpo_jax.run.folder import claim_folder, hold_folder, lock_folder
from pgpo_jax.run.record import Clock, records, summarise, token_columns
from pgpo_jax.run.session import STOPPED, Session
from pgpo_jax.run.setup import Run, check_rows, checkpoint_folder, describe, join, load_run
from pgpo_jax.run.updates import configured_optimizer, judged_examples, make_updates
from pgpo_jax.run.warm_up import warm_up

__all__ = [
    "STOPPED",
    "Clock",
    "Interrupted",
    "Models",
    "Run",
    "Session",
    "check_rows",
    "check_siblings",
    "checkpoint_folder",
    "claim_folder",
    "configured_optimizer",
    "describe",
    "evaluate_sets",
    "hold_folder",
    "join",
    "judged_examples",
    "load_run",
    "lock_folder",
    "make_updates",
    "reactions",
    "records",
    "run_discovery",
    "summarise",
    "token_columns",
    "warm_up",
]
