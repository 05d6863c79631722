"""Loads checkpoints with the real vLLM on a CPU, and writes down what it computes with.

A program, not a test: test_vllm.py runs it once for all models, because importing vLLM takes
fifteen seconds. Each model gets a process of its own, forked from the one that has imported it.

    vllm_worker.py JOBS FOLDER

JOBS is JSON: `prompt`, tokens, and `models`, a list of objects: `name`, `model` (its folder),
`dtype` (vLLM's, default auto), `environment` (variables to set) and `float32` (whether quantization
states are read under float32, which vLLM itself does not). Of each, FOLDER gets NAME.json, and
NAME.safetensors with the weights as vLLM multiplies by them.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
import warnings
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",  # or it compiles the sampler, for each model anew
}  # fmt: skip
warnings.filterwarnings("ignore")

import bitsandbytes  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import vllm  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402 - each model's process would import it
import vllm_bnb_plugin  # noqa: E402, F401 - the same
from safetensors.torch import save_file  # noqa: E402
from vllm.model_executor.layers import fused_moe  # noqa: E402
from vllm.model_executor.layers.linear import LinearBase  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402

HELD: list[Any] = []
"""Keeps vLLM from taking an engine apart, which takes a second, before its process ends."""


def torch_experts(
    hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor,
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """Compute what vLLM's kernel for experts does, which wants a GPU: the experts are SwiGLU."""
    out = torch.zeros_like(hidden_states)
    for expert in range(w1.shape[0]):
        token, choice = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden_states[token] @ w1[expert].to(out.dtype).T).chunk(2, -1)
        weighted = (torch.nn.functional.silu(gate) * up) @ w2[expert].to(out.dtype).T
        out.index_add_(0, token, weighted * topk_weights[token, choice, None].to(out.dtype))
    return out


def read_states_under_float32() -> None:
    """Make bitsandbytes read the offset of double quantization as it is stored.

    It makes a tensor of the default dtype of it, which is the model's while vLLM loads.
    """
    original = bitsandbytes.functional.QuantState.from_dict.__func__

    def from_dict(cls: Any, *arguments: Any, **named: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return original(cls, *arguments, **named)
        finally:
            torch.set_default_dtype(before)

    bitsandbytes.functional.QuantState.from_dict = classmethod(from_dict)


def multiplied_by(module: Any) -> torch.Tensor:
    """Return the weight of a linear layer: what vLLM makes of the rows of an identity matrix.

    Packed weights are decoded on the way, by vLLM's code; plain ones it keeps in the layout of its
    kernel only, on a CPU.
    """
    unit = torch.eye(module.input_size, dtype=torch.get_default_dtype())
    return module.quant_method.apply(module, unit).T.contiguous()


def weights_of(model: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return every weight that vLLM holds by its name for it, and the names of packed ones."""
    weights = {n: p.detach().clone().contiguous() for n, p in model.named_parameters()}
    packed = [n for n, p in model.named_parameters() if hasattr(p, "bnb_quant_state")]
    for path, module in model.named_modules():
        if isinstance(module, LinearBase):
            weights[f"{path}.weight"] = multiplied_by(module)
        elif hasattr(module, "w13_weight") and f"{path}.w13_weight" in packed:
            method = module.quant_method
            both = method._apply_4bit_dequnt(module)
            weights |= dict(zip((f"{path}.w13_weight", f"{path}.w2_weight"), both, strict=True))
    return weights, packed


def logprobs(llm: Any, prompt: list[int]) -> list[float]:
    """Return the log-probability of each token of a prompt but the first."""
    how = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    (done,) = llm.generate([{"prompt_token_ids": prompt}], how, use_tqdm=False)
    return [found[token].logprob
            for token, found in zip(prompt[1:], done.prompt_logprobs[1:], strict=True)]  # fmt: skip


def look(job: dict[str, Any], prompt: list[int], folder: Path) -> dict[str, Any]:
    os.environ.update(job.get("environment", {}))
    if job.get("float32"):
        read_states_under_float32()
    fused_moe.fused_experts = torch_experts
    # vLLM asks about a model's class in another process, which would import all of it again.
    registry._run_in_subprocess = lambda function: function()
    llm = vllm.LLM(
        model=job["model"], dtype=job.get("dtype", "auto"), enforce_eager=True,
        skip_tokenizer_init=True, max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64,
    )  # fmt: skip
    HELD.append(llm)
    found: dict[str, Any] = {"logprobs": logprobs(llm, prompt)}
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    torch.set_default_dtype(runner.dtype)
    with torch.no_grad():
        weights, found["packed"] = weights_of(runner.model)
    found["fused"] = runner.model.packed_modules_mapping
    save_file(weights, folder / f"{job['name']}.safetensors")
    return found


def run(job: dict[str, Any], prompt: list[int], folder: Path) -> None:
    """Look at one model, in this process."""
    try:
        found = look(job, prompt, folder)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        found = {"error": f"{type(error).__name__}: {error}",
                 "at": [f"{Path(f.filename).name} {f.name}" for f in frames]}  # fmt: skip
    (folder / f"{job['name']}.json").write_text(json.dumps(found, indent=1))


def main(jobs: str, folder: str) -> None:
    gc.collect()
    gc.freeze()  # vLLM collects five times a model: not what is imported once
    given = json.loads(Path(jobs).read_text())
    for job in given["models"]:
        child = os.fork()
        if child == 0:
            run(job, given["prompt"], Path(folder))
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
    installed = {
        "vllm": vllm.__version__, "transformers": transformers.__version__,
        "vllm-bnb-plugin": version("vllm-bnb-plugin"),
        "the plugin asks for": requires("vllm-bnb-plugin"),
    }  # fmt: skip
    (Path(folder) / "installed.json").write_text(json.dumps(installed))


if __name__ == "__main__":
    main(*sys.argv[1:])
