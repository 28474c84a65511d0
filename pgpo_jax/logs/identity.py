"""Identity of a run in trackers: its id and name, kept in its folder, and what was sent before."""

import json
import uuid
from pathlib import Path
from typing import NamedTuple

from pgpo_jax.logs import jsonl

FILE = "trackers.json"
METRICS = "metrics.jsonl"


class Identity(NamedTuple):
    """What a tracker knows a run by."""

    id: str
    name: str
    sent: int
    """The last step that was sent before the run was interrupted; -1 where none was."""


def identify(folder: Path, name: str | None, resume_from: int | None) -> Identity:
    """The identity of the run in `folder`: that of before where it resumes, else a new one.

    A resumed run repeats the steps since its checkpoint. They are in the trackers already, which
    take no step twice.

    Args:
      folder: The run's, with `metrics.jsonl` as the interruption left it.
      name: The run's name; None is the name that the folder had when the run was started.
      resume_from: The step of the checkpoint; None where the run starts anew.
    """
    path, before = folder / FILE, {}
    if resume_from is not None and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
    found = {"id": uuid.uuid4().hex[:12], "name": folder.name} | before
    if found != before:
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    sent = -1
    if before and (folder / METRICS).is_file():  # not the line at which a run was killed
        rows = (line.row.get("step") for line in jsonl.read(folder / METRICS))
        sent = max((step for step in rows if isinstance(step, int)), default=-1)
    return Identity(found["id"], name or found["name"], sent)
