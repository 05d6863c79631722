"""Calibration against what the model predicts: gradients, feedback in both directions, devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import text_models
import torch
import transformers
from tiny_models import V

from nf4cli.engines.cpu import FEEDBACK_ROWS, CpuEngine, available
from nf4cli.format.codebook import codebook
from nf4cli.format.config import QuantConfig
from nf4cli.quality.calibration import gradients
from nf4cli.quality.calibration.gptq import corrected, feed_back
from nf4cli.quality.calibration.passes import Calibration, Settings
from nf4cli.quality.calibration.rounding import round_matrix
from nf4cli.quality.calibration.side_by_side import Run, Stops

VALUES, MIDPOINTS = (
    torch.from_numpy(t) for t in (codebook("nf4").values, codebook("nf4").midpoints)
)
LINEARS = torch.nn.Linear, transformers.pytorch_utils.Conv1D


def random(seed):
    return torch.Generator().manual_seed(seed)


def tokens(count=5, length=16):
    return torch.randint(5, V - 5, (count, length), generator=random(2)).numpy()


def moments(size, seed, samples=None):
    """Second moments of correlated columns of unequal size."""
    mix = torch.randn(size, size, generator=random(seed)) / size**0.5
    rows = torch.randn(samples or 4 * size, size, generator=random(seed + 1)) @ mix
    rows *= torch.rand(size, generator=random(seed + 2)) * 4
    return rows.T @ rows / len(rows)


def problem(rows, columns, seed=0):
    weight = torch.randn(rows, columns, generator=random(seed)) * 0.1
    inputs = moments(columns, seed + 10)
    outputs = [
        moments(min(FEEDBACK_ROWS, rows - start), seed + 20 + start)
        for start in range(0, rows, FEEDBACK_ROWS)
    ]
    recipe = QuantConfig(scale="search")
    rounded = round_matrix(weight.numpy(), inputs.diagonal().numpy().copy(), CpuEngine(), recipe)
    return weight, inputs, outputs, torch.from_numpy(rounded.scale)


def kronecker_loss(error, inputs, outputs):
    """The sum over tiles of trace(outputs error inputs error^T)."""
    parts = error.split(FEEDBACK_ROWS)
    return sum(float((o @ e @ inputs * e).sum()) for o, e in zip(outputs, parts, strict=True))


def test_feedback_in_both_directions_is_the_plain_algorithm():
    """Against one element after another, with the inverse of the whole Kronecker product itself."""
    rows, columns, damping = 6, 64, 0.03
    weight, inputs, outputs, scale = problem(rows, columns)
    ours = feed_back(weight, inputs, scale, "nf4", damping, outputs=outputs).long()

    def damped(matrix):
        matrix = matrix.double().clone()
        matrix.diagonal().add_(damping * matrix.diagonal().mean())
        return matrix

    whole = torch.kron(damped(inputs), damped(outputs[0]))  # element (row, column): column first
    order = [
        int(column) * rows + int(row)
        for column in torch.argsort(inputs.diagonal(), descending=True, stable=True)
        for row in torch.argsort(outputs[0].diagonal(), descending=True, stable=True)
    ]
    work, units = weight.double().T.flatten().clone(), scale.double().T.flatten()
    ranks = torch.zeros(rows * columns, dtype=torch.long)
    inverse = torch.linalg.inv(whole[order][:, order])
    for place, element in enumerate(order):
        rank = torch.bucketize((work[element] / units[element]).float(), MIDPOINTS)
        ranks[element] = rank
        error = (work[element] - VALUES[rank].double() * units[element]) / inverse[0, 0]
        work[order[place + 1 :]] -= error * inverse[0, 1:]
        # What is left when the first variable is taken out.
        inverse = inverse[1:, 1:] - inverse[1:, :1] @ inverse[:1, 1:] / inverse[0, 0]
    ranks = ranks.view(columns, rows).T
    assert (ranks != ours).double().mean() < 0.01  # float32 against float64, at a midpoint
    found, expected = (
        kronecker_loss(weight - VALUES[r] * scale, inputs, outputs) for r in (ours, ranks)
    )
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("rows", [7, FEEDBACK_ROWS, 2 * FEEDBACK_ROWS + 5])
def test_it_loses_less_than_feedback_between_columns_alone(rows):
    weight, inputs, outputs, scale = problem(rows, 96)
    both, alone = (
        feed_back(weight, inputs, scale, "nf4", 0.01, outputs=o).long() for o in (outputs, None)
    )
    lost = [kronecker_loss(weight - VALUES[r] * scale, inputs, outputs) for r in (both, alone)]
    assert lost[0] < 0.8 * lost[1]
    diagonal = [torch.eye(len(part)) for part in outputs]  # rows that have nothing to hand on
    apart = feed_back(weight, inputs, scale, "nf4", 0.01, outputs=diagonal)
    assert torch.equal(apart.long(), alone)


@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("together", [False, True])
def test_columns_are_rounded_alike_by_every_instruction_set(isa, together):
    columns, rows = 33, 2 * FEEDBACK_ROWS + 9
    draw = np.random.default_rng(5)
    values = draw.normal(size=(columns, rows)).astype(np.float32)
    scale = draw.normal(size=(columns, rows)).astype(np.float32)
    scale[3] = 0
    factor = np.triu(draw.normal(size=(columns, columns))).astype(np.float32)
    np.fill_diagonal(factor, draw.uniform(0.5, 2, columns))
    sizes = [FEEDBACK_ROWS, FEEDBACK_ROWS, 9]
    shares = np.concatenate([draw.normal(size=n * n).astype(np.float32) * 0.1 for n in sizes])

    def run(engine, parts):
        work, ranks, errors = values.copy(), np.zeros(values.shape, np.uint8), np.zeros_like(values)
        for part in parts:
            own = shares[(part.start // FEEDBACK_ROWS) * FEEDBACK_ROWS**2 :]
            whole, rest = divmod(len(part), FEEDBACK_ROWS)
            own = own[: whole * FEEDBACK_ROWS**2 + rest**2]
            engine.round_columns(
                work, scale, factor, own if together else None, "nf4", ranks, errors, part
            )
        return ranks, errors, work

    expected = run(CpuEngine("generic"), [range(rows)])
    halves = [range(FEEDBACK_ROWS), range(FEEDBACK_ROWS, rows)]  # as two threads would
    for found in (run(CpuEngine(isa), [range(rows)]), run(CpuEngine(isa), halves)):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(np.unique(expected[0])) == 16
    with pytest.raises(ValueError, match="rows 0 to"):
        run(CpuEngine(isa), [range(rows + 1)])


def test_what_the_rounded_models_inputs_lack_is_asked_back():
    """All the way it is the least-squares solution for the outputs before."""
    weight = torch.randn(5, 12, generator=random(1))
    before = torch.randn(300, 12, generator=random(2))
    rounded = before @ (torch.eye(12) + 0.1 * torch.randn(12, 12, generator=random(3)))
    hessian, drift = rounded.T @ rounded / 300, (before - rounded).T @ rounded / 300
    found = corrected(weight, hessian, drift, 1e-6, 1.0)
    expected = torch.linalg.lstsq(rounded, before @ weight.T).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(corrected(weight, hessian, drift, 1e-6, 0.0), weight)
    half = corrected(weight, hessian, drift, 1e-6, 0.5)
    torch.testing.assert_close(half, (found + weight) / 2)


# -- gradients ----------------------------------------------------------------------------------


def pass_over(root, seen, scratch, method="yaqa", device="cpu", fixed=None):
    model = transformers.AutoConfig.from_pretrained(root)
    whole = getattr(transformers, model.architectures[0]).from_pretrained(root)
    names = [f"{n}.weight" for n, m in whole.named_modules() if isinstance(m, LINEARS)]
    found = Calibration(
        root, seen, scratch, names, QuantConfig(scale="search"), CpuEngine(), Settings(method), {},
        device=device, fixed=fixed,
    )  # fmt: skip
    found.run()
    return found


def whole_model(root):
    config = transformers.AutoConfig.from_pretrained(root)
    return getattr(transformers, config.architectures[0]).from_pretrained(root).float().eval()


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "opt", "bloom", "gemma3_text", "qwen3", "gpt_neox", "phi3", "bert_mlm"],
)
def test_gradients_are_those_of_the_whole_model(name, tmp_path):
    root, seen = text_models.make(name, tmp_path / "model"), tokens()
    pass_over(root, seen, tmp_path / "scratch")
    files = sorted((tmp_path / "scratch").glob("gradients-*.safetensors"))
    found = {k: v for file in files for k, v in gradients.load(file).items()}
    assert len(found) >= 8

    model = whole_model(root).requires_grad_(False)
    by_layer: dict[str, list[torch.Tensor]] = {}
    inputs: dict[str, torch.Tensor] = {}

    def watch(key):
        def forward(module, args, output):
            inputs[key] = args[0]
            output.register_hook(
                lambda g: by_layer.setdefault(key, []).append(g.reshape(-1, g.shape[-1]).clone())
            )

        return forward

    for key, module in model.named_modules():
        if isinstance(module, LINEARS):
            module.register_forward_hook(watch(f"{key}.weight"))
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())
    for number, window in enumerate(seen):
        logits = model(input_ids=torch.from_numpy(window[None])).logits
        draws = np.random.Generator(np.random.PCG64(number))
        bits = np.unpackbits(np.frombuffer(draws.bytes(-(-logits.numel() // 8)), np.uint8))
        signs = torch.from_numpy(bits[: logits.numel()].reshape(logits.shape)).float() * 2 - 1
        p = logits.detach().softmax(-1)
        root_p = p.sqrt() * signs
        logits.backward(root_p - p * root_p.sum(-1, keepdim=True))
    for key, own in found.items():
        gradient = torch.stack(by_layer[key])
        weights = sum(
            (g := torch.stack(by_layer[k]).square().sum(-1)) / g.mean()
            for k in found
            if inputs[k] is inputs[key]
        )
        torch.testing.assert_close(own.weights, weights / weights.mean(), rtol=2e-3, atol=1e-4)
        flat = gradient.flatten(0, 1)
        for number, part in enumerate(own.outputs):
            rows = flat[:, number * FEEDBACK_ROWS : (number + 1) * FEEDBACK_ROWS]
            expected = rows.T @ rows
            torch.testing.assert_close(part, expected, rtol=5e-3, atol=2e-3 * float(expected.max()))


def test_the_progress_comes_to_its_end(tmp_path):
    """A part for each pass, the time behind the blocks counted; so too where gradients are kept."""
    root, told = text_models.make("llama", tmp_path / "model"), []
    whole = transformers.LlamaForCausalLM.from_pretrained(root)
    names = [f"{n}.weight" for n, m in whole.model.named_modules() if isinstance(m, LINEARS)]
    names = [f"model.{n}" for n in names]

    def calibration():
        found = Calibration(
            root, tokens(), tmp_path / "scratch", names, QuantConfig(scale="search"), CpuEngine(),
            Settings("yaqa"), {},
        )  # fmt: skip
        found.progress = lambda name, nbytes: told.append(nbytes)
        return found

    first = calibration()
    first.run()
    assert sum(told) == first.nbytes
    told.clear()
    again = calibration()
    again.run()
    assert sum(told) == again.nbytes


def test_directions_have_the_second_moments_of_the_prediction():
    """Their mean product is diag(p) - p p^T, which is what KL divergence costs."""
    logits = torch.randn(6, generator=random(4))
    p, draws = logits.softmax(-1), np.random.Generator(np.random.PCG64(0))
    signs = gradients._signs(draws, (40_000, 6))
    roots = p.sqrt() * signs
    directions = roots - p * roots.sum(-1, keepdim=True)
    found = directions.T @ directions / len(directions)
    torch.testing.assert_close(found, p.diag() - p.outer(p), rtol=0.05, atol=3e-3)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}


def test_an_encoder_without_a_prediction_is_calibrated(tmp_path):
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    root = text_models.save(transformers.BertModel(config), tmp_path / "model", torch.float32)
    plain, ours = (pass_over(root, tokens(), tmp_path / m, m) for m in ("gptq", "yaqa"))
    assert plain.losses.keys() == ours.losses.keys()
    assert len(ours.losses) == 12
    assert any(
        not np.allclose(ours.importance[k], plain.importance[k], rtol=0.01) for k in ours.importance
    )


def kl_of(root, files, seen, held):
    """The KL divergence of a model whose weights are decoded by `held`."""
    before, after = whole_model(root), whole_model(root)
    with torch.no_grad():
        for name, module in after.named_modules():
            if isinstance(module, LINEARS) and f"{name}.weight" in held:
                decoded = held[f"{name}.weight"]
                module.weight.copy_(decoded if isinstance(module, LINEARS[0]) else decoded.T)
        p, q = (m(input_ids=torch.from_numpy(seen)).logits.log_softmax(-1) for m in (before, after))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_loses_less_of_the_prediction_than_gptq(name, tmp_path):
    root = text_models.make(name, tmp_path / "model")
    lost = {}
    for method in ("rtn", "gptq", "yaqa"):
        chosen: dict[str, torch.Tensor] = {}
        calibration_choose = Calibration._choose

        def keep(self, name, *args, chosen=chosen, choose=calibration_choose):
            chosen[name] = choose(self, name, *args)
            return chosen[name]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Calibration, "_choose", keep)
            pass_over(root, tokens(32, 32), tmp_path / method, method)
        lost[method] = kl_of(root, None, tokens(48, 32)[32:], chosen)
    assert lost["yaqa"] < lost["gptq"] < lost["rtn"]


# -- side by side ---------------------------------------------------------------------------------


class Routed(torch.nn.Module):
    """Three layers, of which a window may pass the second or not."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(3, 3) for _ in range(3))

    def forward(self, states, detour):
        states = self.a(states)
        if detour:
            states = self.b(states)
        return self.c(states)


def test_no_run_passes_a_layer_before_all_that_come_there_stand_before_it():
    block, seen, ends = Routed(), [], []
    runs = [
        Run(i, lambda i=i: ends.append((i, block(torch.full((1, 3), float(i)), i % 2))))
        for i in range(4)
    ]
    stops = Stops({"a": block.a, "b": block.b, "c": block.c})
    with torch.no_grad(), stops.watching(runs):
        for run in runs:
            run.go_on()
        while (layer := stops.next_layer(runs)) is not None:
            here = [run for run in runs if run.layer == layer]
            seen.append((layer, [run.window for run in here]))
            assert all(run.rows().shape == (1, 3) for run in here)
            if layer == "b":
                block.b.weight.zero_()  # what is rounded is what the runs go through
            for run in here:
                run.go_on()
    assert seen == [("a", [0, 1, 2, 3]), ("b", [1, 3]), ("c", [0, 1, 2, 3])]
    assert sorted(i for i, _ in ends) == [0, 1, 2, 3]
    results = dict(ends)
    assert torch.equal(results[1], results[3])  # both are b's bias by now
    assert not torch.equal(results[0], results[2])
    assert not any(m._forward_pre_hooks for m in block.modules())


def test_an_error_in_a_run_ends_the_others_and_takes_the_hooks_away():
    block, left = Routed(), []

    def work(window):
        try:
            block(torch.ones(1, 3), False)
            if window == 1:
                raise ValueError("in the second window")
        finally:
            left.append(window)

    runs = [Run(i, lambda i=i: work(i)) for i in range(3)]
    stops = Stops({"a": block.a, "c": block.c})

    def drive():
        with stops.watching(runs):
            for run in runs:
                run.go_on()
            while stops.next_layer(runs) is not None:
                for run in runs:
                    run.go_on()

    with pytest.raises(ValueError, match="in the second window"):
        drive()
    assert sorted(left) == [0, 1, 2]
    assert not any(m._forward_pre_hooks for m in block.modules())


# -- another device -------------------------------------------------------------------------------


def test_all_of_a_calibration_computes_on_the_device_that_is_asked_for(tmp_path):
    """On one that runs on the CPU, and refuses tensors of the CPU as a GPU does."""
    families = ["llama", "gpt2", "opt", "gemma3_text", "qwen3", "phi3"]
    worker = Path(__file__).parents[1] / "other_device_worker.py"
    done = subprocess.run(
        [sys.executable, worker, tmp_path, "rtn,gptq,yaqa", ",".join(families)],
        check=False, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["refuses"]
    assert found["logits"] == [[1, 4, V], "elsewhere"]
    assert len(found["apart"]) == 18
    for case, apart in found["apart"].items():
        assert apart["weights"] >= 8, case
        assert apart["losses"] < 1e-4, case
        assert apart["importance"] < 1e-3, case
