"""The same update, SDPO with the multiplier of PGPO, written plainly in PyTorch and transformers.

A model from `transformers` (its `sdpa` attention), `torch.optim.AdamW` in its fused form, automatic
mixed precision for bfloat16. Only the logits of response positions are computed, and the teacher
runs under `no_grad`; nothing is chunked, compiled or recomputed. The formulas are written out here
again, from the papers and not from `pgpo_jax`, so that equal losses mean something.
"""

import copy
from typing import Any

import numpy as np
import torch
import transformers

from pgpo_jax.data import Examples
from pgpo_jax.losses import DistillationConfig
from pgpo_jax.optimizer import OptimizerConfig
from pgpo_jax.teacher import AVERAGE

VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}


class Peer:
    """Student, teacher and optimizer of a checkpoint in `folder`, and a batch to train them on."""

    def __init__(
        self,
        folder: str,
        examples: Examples,
        distillation: DistillationConfig,
        optimizer: OptimizerConfig,
        *,
        bfloat16: bool,
        device: str,
        threads: int | None,
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        self.distillation, self.settings, self.bfloat16 = distillation, optimizer, bfloat16
        self.device = torch.device(device)
        self.student: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).to(self.device)
        self.student.train()  # there is no dropout: the same numbers as in `eval`
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(),
            lr=optimizer.learning_rate,
            betas=(optimizer.b1, optimizer.b2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

        def on_device(x):
            return torch.as_tensor(np.array(x), device=self.device)

        self.prompts = {
            view: (on_device(tokens), on_device(mask))
            for view, (tokens, mask) in examples.prompts.items()
        }
        self.responses, self.response_mask = map(
            on_device, (examples.responses, examples.response_mask)
        )
        self.sampler_log_probs = on_device(examples.sampler_log_probs)
        self.has_context = on_device(examples.has_context)

    def step(self) -> dict[str, float]:
        """One update; returns loss, information and multiplier."""
        d = self.distillation
        weights = self.response_mask / self.response_mask.sum(1, keepdim=True).clamp(min=1)
        logits = self._response_logits(self.student, *self.prompts["student"])
        log_s = torch.log_softmax(logits / d.temperature, dim=-1)
        with torch.no_grad():
            logits = self._response_logits(self.teacher, *self.prompts["teacher"])
            log_q = torch.log_softmax(logits / d.temperature, dim=-1)
            del logits
            chosen = self.responses.long()[..., None]
            log_prob = log_s.gather(-1, chosen)[..., 0]
            importance = (log_prob - self.sampler_log_probs).clamp(-20, 20).exp()
            importance = importance.clamp(max=d.importance_cap)
            gap = _entropy(log_s) - _entropy(log_q)
            in_context = weights * self.has_context[:, None]
            rows = self.has_context.sum().clamp(min=1)
            information = (in_context * gap).sum() / rows
        per_token = importance * self._divergence(log_s, log_q)
        loss = (in_context * per_token).sum() / len(self.responses)
        del log_q

        self.optimizer.zero_grad()
        loss.backward()
        s = self.settings
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), s.max_grad_norm)
        multiplier = (s.alpha * information).exp().clamp(s.rho_min, s.rho_max).item()
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate * multiplier  # scales the decay too, as in the paper
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.teacher.parameters()),
                list(self.student.parameters()),
                AVERAGE.ema_rate,
            )
        return {
            "loss": loss.item(),
            "information": information.item(),
            "multiplier": multiplier,
        }

    def _response_logits(self, model, prompts, prompt_mask):
        """Float32 logits that predict each response token, behind a left-padded prompt."""
        mask = torch.cat([prompt_mask, self.response_mask], dim=1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits = model(
                input_ids=torch.cat([prompts, self.responses], dim=1).long(),
                attention_mask=mask.long(),
                position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=self.responses.shape[1] + 1,
            ).logits
        return logits[:, :-1].float()

    def _divergence(self, log_s, log_q):
        """Jensen-Shannon divergence on the student's top k and the rest in one bucket."""
        indices = log_s.detach().topk(self.distillation.top_k, dim=-1).indices
        log_s, log_q = _with_tail(log_s.gather(-1, indices)), _with_tail(log_q.gather(-1, indices))
        w = self.distillation.jsd_weight
        log_m = torch.logaddexp(log_s + np.log(1 - w), log_q + np.log(w))
        to_student = (log_s.exp() * (log_s - log_m)).sum(-1)
        to_teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
        return (1 - w) * to_student + w * to_teacher


def _with_tail(log_p):
    inside = log_p.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_p, torch.log(-torch.expm1(inside))], dim=-1)


def _entropy(log_p):
    return -(log_p.exp() * log_p).sum(-1)
