"""What training needs around its loop: setup, folder, records, reactions."""

from pgpo_jax.run.folder import claim_folder
from pgpo_jax.run.record import records, summarise, token_columns
from pgpo_jax.run.setup import Run, check_rows, checkpoint_folder, describe, load_run

__all__ = [
    "Run",
    "check_rows",
    "checkpoint_folder",
    "claim_folder",
    "describe",
    "load_run",
    "records",
    "summarise",
    "token_columns",
]
