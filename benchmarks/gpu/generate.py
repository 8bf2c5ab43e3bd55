"""Whole models on the device at hand, right and timed: for `fusion-lm gpu-check`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from fusion_model.benchmarks.gpu import timing

from fusion_model import decoding as device_generation
from fusion_model.config import FusionLMConfig
from fusion_model.model import FusionLMForCausalLM

Result = dict[str, Any]
STEPS = 60


def _model(device: torch.device, **options: Any) -> Any:
    torch.manual_seed(0)
    size = {"embedding_size": 128, "hidden_size": 320, "prefix_size": 64, "vocab_size": 5003}
    config = FusionLMConfig(**(size | {"initializer_range": 1.0} | options))
    model: Any = FusionLMForCausalLM(config)
    return model.eval().to(device)


def greedy(device: torch.device, fusion: str, layers: int, batch: int) -> Result:
    """In float32 the tokens of the equations (cuDNN's would be of TensorFloat-32)."""
    model = _model(device, fusion=fusion, num_layers=layers)
    ids = torch.randint(3, 5003, (batch, 4), device=device)
    options: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}
    if fusion != "none":
        options["prefix_embeds"] = torch.randn(batch, 64, device=device)
    tokens = {}
    for backend in ("reference", "triton"):
        model.set_backend(backend)
        tokens[backend] = model.generate(ids, **options)
    if model not in device_generation._decoders:
        return {"ok": False, "error": "it took the ordinary path"}
    if torch.equal(*tokens.values()):
        return {"ok": True}
    shape = [t.shape[1] for t in tokens.values()]
    expected, got = (t[:, : min(shape)] for t in tokens.values())
    return {"ok": False, "error": f"{int((expected != got).sum())} tokens differ; lengths {shape}"}


def sampled(device: torch.device, top_k: int) -> Result:
    """In bfloat16: repeatable by the seed, and otherwise not the same."""
    model = _model(device, fusion="gate").to(torch.bfloat16)
    model.set_backend("triton")
    ids, e = torch.randint(3, 5003, (8, 4), device=device), torch.randn(8, 64, device=device)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        options = {"do_sample": True, "top_k": top_k, "max_new_tokens": STEPS}
        found.append(model.generate(ids, prefix_embeds=e, **options))
    good = torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    return {"ok": good and model in device_generation._decoders}


def cases(device: torch.device) -> list[tuple[str, Any]]:
    found = [
        (f"greedy {fusion} L{layers} B{batch}", partial(greedy, device, fusion, layers, batch))
        for fusion in ("none", "concat", "gate", "init_both")
        for layers, batch in ((1, 1), (2, 17))
    ]
    return found + [(f"sampled, top k {k}", partial(sampled, device, k)) for k in (0, 40)]


def times(device: torch.device) -> Iterator[tuple[str, Any]]:
    """By the kernels, and by PyTorch's operations with cuDNN: the same model, as users run it."""
    for what, batch, steps in (
        ("scoring", 64, 48), ("generation", 1, 64), ("generation", 16, 64), ("training", 64, 32)
    ):  # fmt: skip
        shape = device, what, batch, steps
        make = partial(lambda *a: (_run("triton", *a), _run("torch", *a)), *shape)
        run = partial(timing.versus, make, False, tags=["model"], steps=steps)
        yield f"{what} bf16 B{batch} T{steps}, eager", run


def _run(
    backend: str, device: torch.device, what: str, batch: int, steps: int
) -> Callable[[], Any]:
    """One call on a batch, with late fusion by `concat`; all in bfloat16, training by autocast."""
    size = {"embedding_size": timing.D, "hidden_size": timing.H, "vocab_size": timing.V}
    model = _model(device, fusion="concat", initializer_range=0.02, **size)
    model.set_backend(backend)
    ids = torch.randint(3, timing.V, (batch, steps), device=device)
    e = torch.randn(batch, steps - 1, 64, device=device)
    if what == "training":
        optimizer = torch.optim.Adam(model.train().parameters(), fused=True)

        def train() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = -model.token_log_probs(ids, e).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return train
    model, e = model.to(torch.bfloat16), e.to(torch.bfloat16)
    if what == "scoring":
        return torch.inference_mode()(lambda: model.token_log_probs(ids, e))
    model.generation_config.eos_token_id = None  # all run to the end
    options = {"prefix_embeds": e[:, 0], "max_new_tokens": steps, "do_sample": False}
    return partial(model.generate, ids[:, :4], **options)
