"""Five steps of a run equal a plain loop in float64: loss, gradient norm, learning rate and weights.

The loop below shares nothing with the trainer but the initial weights and the order of the data: it has its own Llama,
AdamW, clipping and schedule.
"""

import math
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from ringflash.data import batch, load_corpus
from ringflash.errors import ConfigError
from ringflash.layout import Layout
from ringflash.models import ARCHITECTURES, build_model
from ringflash.training.compose import compose
from ringflash.training.engine import build_engine
from ringflash.training.memory import MemoryConfig
from ringflash.training.metrics import read
from ringflash.training.optimizers.build import build_optimizer, parameter_groups
from ringflash.training.optimizers.config import OptimConfig
from ringflash.training.step import prepare, train_step
from tests.models.cases import tiny
from tests.training.engines import LENGTH, build, joined, sequences
from tests.training.fits import SETTINGS, STEPS, fit_on_ranks, weights_of


def settings_of(texts):
    """The settings of a run on these texts."""
    return [*SETTINGS, f"data.path={texts}", f"data.cache={texts.parent}/cache", f"output_dir={texts.parent}/runs"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Forty documents of uneven lengths, so that ranks and rows predict uneven numbers of tokens."""
    folder = tmp_path_factory.mktemp("optimizer") / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i} " + "all work and no play "[: 3 + 7 * i % 20] * (1 + i % 3))
    return folder


# -- the plain loop


def plain_logits(w, architecture, tokens):
    """Logits [S, V] of one document's tokens [S] through a Llama with weights `w`, in float64."""

    def normalised(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + architecture.rms_norm_eps).rsqrt() * w[name]

    def heads(x, layer, name):
        return (x @ w[f"{layer}self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, dim)).transpose(0, 1)

    def rotated(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    dim, length = architecture.head_dim, len(tokens)
    base = architecture.rope_parameters["rope_theta"]
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    x = w["model.embed_tokens.weight"][tokens]
    for layer in (f"model.layers.{i}." for i in range(architecture.num_hidden_layers)):
        h = normalised(x, f"{layer}input_layernorm.weight")
        q, k, v = rotated(heads(h, layer, "q")), rotated(heads(h, layer, "k")), heads(h, layer, "v")
        k, v = (t.repeat_interleave(len(q) // len(t), dim=0) for t in (k, v))
        scores = (q @ k.mT / math.sqrt(dim)).masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w[f"{layer}self_attn.o_proj.weight"].T
        h = normalised(x, f"{layer}post_attention_layernorm.weight")
        gate, up, down = (w[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (nn.functional.silu(h @ gate.T) * (h @ up.T)) @ down.T
    return normalised(x, "model.norm.weight") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def plain_loss(w, architecture, rows):
    """Mean loss per predicted token of a batch."""
    total, count = 0.0, 0
    for tokens, labels, lengths in zip(rows.tokens, rows.labels, rows.documents, strict=True):
        for piece, target in zip(tokens.split(lengths), labels.split(lengths), strict=True):
            logits = plain_logits(w, architecture, piece)
            total = total + nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
            count += int((target != -100).sum())
    return total / count


def plain_rate(optim, step):
    """The learning rate of a step, counted from 1."""
    if step <= optim.warmup:
        return optim.lr * step / optim.warmup
    done = (step - optim.warmup) / (optim.steps - optim.warmup)
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * (1 + math.cos(math.pi * done)) / 2)


class PlainAdamW:
    """AdamW with clipping and schedule, over weights {name: float64}."""

    def __init__(self, w):
        self.w = w
        self.m, self.v = ({name: torch.zeros_like(x) for name, x in w.items()} for _ in range(2))
        self.steps = 0

    def step(self, gradients, optim):
        """The gradients' norm, before clipping."""
        self.steps += 1
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients.values()))
        rate = plain_rate(optim, self.steps)
        for name, g in gradients.items():
            g = g * min(1.0, optim.clip / norm)
            self.m[name] = optim.beta1 * self.m[name] + (1 - optim.beta1) * g
            self.v[name] = optim.beta2 * self.v[name] + (1 - optim.beta2) * g * g
            mean, square = (x[name] / (1 - b**self.steps) for x, b in ((self.m, optim.beta1), (self.v, optim.beta2)))
            decay = optim.weight_decay if self.w[name].dim() == 2 else 0.0
            self.w[name] = self.w[name] - rate * (mean / (square.sqrt() + optim.eps) + decay * self.w[name])
        return norm


class PlainSGD(PlainAdamW):
    """SGD with momentum."""

    def step(self, gradients, optim):
        """The gradients' norm, before clipping."""
        self.steps += 1
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients.values()))
        for name, g in gradients.items():
            decay = optim.weight_decay if self.w[name].dim() == 2 else 0.0
            g = g * min(1.0, optim.clip / norm) + decay * self.w[name]
            self.m[name] = optim.beta1 * self.m[name] + g
            self.w[name] = self.w[name] - plain_rate(optim, self.steps) * self.m[name]
        return norm


@pytest.fixture(scope="module")
def plain(texts):
    """(loss, gradient norm, learning rate) of each step, the weights before and the weights after, in float64."""
    return plainly(settings_of(texts), PlainAdamW)


def plainly(settings, optimizer):
    """What a plain loop does with these settings."""
    config, _ = compose(settings)
    torch.manual_seed(config.seed)
    model, optim = build_model(config.model), config.optim
    start = {name: p.detach().double() for name, p in model.named_parameters()}
    plain, records = optimizer(dict(start)), []
    corpus, _ = load_corpus(config.data)
    for step in range(STEPS):
        rows = batch(corpus, seed=config.data.seed, step=step, batch_size=optim.batch, length=32)
        w = {name: x.clone().requires_grad_() for name, x in plain.w.items()}
        loss = plain_loss(w, model.config, rows)
        gradients = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
        records.append((loss.item(), plain.step(gradients, optim), plain_rate(optim, step + 1)))
    return records, start, plain.w


# -- the run


CASES = [
    # ranks, ring, zero, micro_batch
    *((1, 1, zero, 4 >> zero // 2) for zero in (0, 3)),
    *((2, 1, zero, 1 + zero % 2) for zero in (0, 1, 2, 3)),
    *((4, 2, zero, 1) for zero in (1, 3)),
    (4, 4, 0, 2),
    (4, 1, 3, 1),
]


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "ring", "zero", "micro_batch"), CASES, ids=str)
def test_five_steps_equal_a_plain_loop_in_float64(ranks, texts, plain, size, ring, zero, micro_batch):
    folder = texts.parent / "runs" / f"{size}-{ring}-{zero}-{micro_batch}"
    grid = [f"parallel.ring={ring}", f"memory.zero={zero}", f"optim.micro_batch={micro_batch}", f"name={folder.name}"]
    ranks.run(fit_on_ranks, size, *compose([*settings_of(texts), *grid]))
    assert_equal(folder, plain)


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 2])
def test_sgd_equals_a_plain_loop_in_float64(ranks, texts, zero):
    folder = texts.parent / "runs" / f"sgd-{zero}"
    settings = [*settings_of(texts), "optim.optimizer=sgd", "optim.lr=0.5", "optim.weight_decay=0.01"]
    settings += ["optim.beta2=0.95", "optim.eps=1e-8"]  # of AdamW: only their defaults are taken
    ranks.run(fit_on_ranks, 2, *compose([*settings, f"memory.zero={zero}", f"name={folder.name}"]))
    # SGD moves norms by little, so that what fp32 rounds of the weight in each step counts
    assert_equal(folder, plainly(settings, PlainSGD), rounding=STEPS * 2**-24)


def assert_equal(folder, plain, rounding=0.0):
    """That a run's records and weights are the plain loop's. rounding: what is allowed of a weight itself."""
    records, start, end = plain
    found = [(r["loss"], r["gradient_norm"], r["lr"]) for r in read(folder / "metrics.jsonl") if "loss" in r]
    assert len(found) == STEPS
    for step, (here, exact) in enumerate(zip(found, records, strict=True), 1):
        assert here == pytest.approx(exact, rel=2e-6), f"step {step}"
    trained = load_file(folder / "model" / "model.safetensors")
    assert trained.keys() == end.keys()
    for name, exact in end.items():
        moved = (exact - start[name]).norm()
        error = (trained[name].double() - exact).norm() - rounding * exact.norm()
        assert error < 2e-5 * moved, f"{name}: relative error of the five updates {error / moved:.1e}"


def bf16_steps(zero, accumulation):
    """Gradient norms of five steps with bf16 weights and those weights; and both by AdamW in float64, below DeepSpeed.

    The latter takes each rank's gradients as autograd made them. At ZeRO 0 their mean over ranks is rounded to bf16.
    """
    world = joined(1)
    optim = OptimConfig(
        steps=STEPS, batch=4 * accumulation, micro_batch=1, lr=1e-2, warmup=2, final_lr=0.3, beta1=0.8, beta2=0.9,
        eps=1e-5, weight_decay=0.5, clip=0.05,
    )  # fmt: skip
    engine = build_engine(build("llama").bfloat16(), optim, MemoryConfig(zero=zero), world)
    named = dict(engine.module.named_parameters())
    sums = {}

    def gather(name):
        return lambda g: sums.__setitem__(name, sums.get(name, 0) + g.double())

    for name, p in named.items():
        p.register_hook(gather(name))
    norms, expected, plain = [], [], PlainAdamW({name: p.double() for name, p in weights_of(engine).items()})
    for _ in range(STEPS):
        sums.clear()
        rows = sequences("uneven").split(accumulation)[world.rank % 3]
        result = train_step(engine, prepare(engine, rows, world, lambda mask: Layout.contiguous(LENGTH, 1)), world)
        for g in sums.values():
            dist.all_reduce(g.div_(world.size))
        gradients = {name: g.bfloat16().double() if zero == 0 else g for name, g in sums.items()}
        norms.append(float(result.gradient_norm))
        expected.append(plain.step(gradients, optim))
    return norms, expected, weights_of(engine), plain.w


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "accumulation"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_bf16_weights_are_those_of_float64_moments_and_masters_rounded(ranks, zero, accumulation):
    norms, exact_norms, weights, masters = ranks.run(bf16_steps, 4, zero, accumulation)[0]
    assert norms == pytest.approx(exact_norms, rel=1e-5)
    for name, master in masters.items():
        alike = (weights[name] == master.bfloat16()).double().mean()
        assert alike > 0.99, f"{name}: {alike:.1%} of the weights are the float64 masters in bf16"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("zero", "dtype", "states", "size"),
    [(0, "fp32", "fp32", 2), (0, "bf16", "fp32", 2), (1, "bf16", "fp32", 2), (3, "bf16", "fp32", 2),
     (1, "bf16", "bf16", 2), (3, "bf16", "bf16", 2), (1, "bf16", "host", 1), (3, "bf16", "host", 2)],
)  # fmt: skip
def test_a_resumed_run_equals_one_that_was_not_bit_for_bit(ranks, texts, zero, dtype, states, size):
    folder = texts.parent / "runs" / f"resumed-{zero}-{dtype}-{states}"
    settings = [
        *settings_of(texts), f"name={folder.name}", f"memory.zero={zero}", f"model.dtype={dtype}", "parallel.ring=1",
        f"optim.micro_batch={4 // size}", "checkpoint.every=3", "resume=auto", f"memory.optimizer_states={states}",
    ]  # fmt: skip
    left = []
    for _ in range(2):
        ranks.run(fit_on_ranks, size, *compose(settings))
        steps = [(r["loss"], r["gradient_norm"], r["lr"]) for r in read(folder / "metrics.jsonl")]
        left.append((steps, (folder / "model" / "model.safetensors").read_bytes()))
        shutil.rmtree(folder / "checkpoints" / "step-00000005")
    assert len(left[0][0]) == STEPS
    assert left[0] == left[1]


# -- its parts


@pytest.mark.parametrize(
    ("warmup", "steps", "rates"),
    [(2, 6, [0.5, 1.0, 0.9267767, 0.75, 0.5732233, 0.5]), (0, 3, [1.0, 0.75, 0.5]), (1, 3, [1.0, 0.75, 0.5]),
     (4, 4, [0.25, 0.5, 0.75, 1.0]), (0, 1, [1.0])],
)  # fmt: skip
def test_the_rate_rises_from_the_first_step_and_ends_at_the_final_one(warmup, steps, rates):
    optim = OptimConfig(steps=steps, warmup=warmup, lr=2.0, final_lr=0.5)
    assert [optim.learning_rate(step) for step in range(1, steps + 1)] == pytest.approx([2 * rate for rate in rates])


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({"schedule": "linear"}, [0.5, 1.0, 0.875, 0.75, 0.625, 0.5]),
        ({"schedule": "constant"}, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "warmup_stable_decay", "decay": 1 / 3}, [0.5, 1.0, 1.0, 1.0, 0.75, 0.5]),
    ],
)
def test_schedules_differ_behind_the_warm_up(schedule, rates):
    optim = OptimConfig(steps=6, warmup=2, lr=2.0, final_lr=0.5, **schedule)
    assert [optim.learning_rate(step) for step in range(1, 7)] == pytest.approx([2 * rate for rate in rates])


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 5), (0.5, 2), (1e-9, 1)])
def test_epochs_are_steps_enough_for_their_sequences(epochs, steps):
    optim = OptimConfig(steps=None, epochs=epochs, batch=4, warmup=0)
    assert optim.of_epoch(10).total_steps == steps
    assert optim.of_epoch(10).learning_rate(steps) == OptimConfig(steps=steps, batch=4, warmup=0).learning_rate(steps)


@pytest.mark.parametrize(("fraction", "warmup"), [(0.07, 7), (0.071, 8), (0.999, 100), (1e-4, 1), (0, 0)])
def test_a_warm_up_below_one_is_a_fraction_of_all_steps(fraction, warmup):
    optim = OptimConfig(steps=None, epochs=1, batch=4, warmup=fraction).of_epoch(400)
    steps = range(1, 101)
    assert [*map(optim.learning_rate, steps)] == [*map(OptimConfig(steps=100, warmup=warmup).learning_rate, steps)]


def test_a_warm_up_of_a_step_and_a_half_is_refused():
    with pytest.raises(
        ConfigError, match=r"^optim\.warmup=1\.5 must be a whole number of steps, or a fraction below 1$"
    ):
        OptimConfig(warmup=1.5)


def test_epochs_of_fewer_steps_than_their_warm_up_are_refused():
    with pytest.raises(ConfigError, match=r"optim\.epochs=2 has 5 steps: optim\.warmup=10 is more than optim\.steps=5"):
        OptimConfig(steps=None, epochs=2, batch=4).of_epoch(10)


@pytest.mark.parametrize(
    ("clips", "states"), [(False, "fp32"), (True, "fp32"), (False, "bf16"), (False, "host")], ids=str
)
def test_every_adamw_gets_its_betas_and_epsilon(clips, states):
    built = build_optimizer(nn.Linear(2, 2), OptimConfig(beta1=0.5, beta2=0.6, eps=0.7), clips, states=states)
    assert {(*group["betas"], group["eps"]) for group in built.param_groups} == {(0.5, 0.6, 0.7)}


def test_states_of_adamw_are_refused_for_sgd():
    with pytest.raises(ConfigError, match=r"memory\.optimizer_states=host is for optim\.optimizer=adamw, not for sgd"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(optimizer="sgd"), False, states="host")


@pytest.mark.parametrize("value", [1.5, math.inf, "1", True, None])
@pytest.mark.parametrize("name", ["steps", "batch", "micro_batch"])
def test_a_count_that_is_no_whole_number_is_refused(name, value):
    is_null = (name, value) == ("steps", None)
    message = "null needs optim.epochs: set one of them" if is_null else f"{value} must be a whole number"
    with pytest.raises(ConfigError, match=rf"^optim\.{name}={message}$"):
        OptimConfig(**{name: value})


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_matrices_decay_and_no_norm_bias_or_sink_does(model_type):
    model = tiny(model_type)
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding | nn.Conv1d)}
    experts = ("experts.gate_up_proj", "experts.up_proj", "experts.down_proj", "router.weight", "gate.weight")
    matrices |= {id(p) for name, p in model.named_parameters() if name.endswith(experts)}
    groups = parameter_groups(model, 0.3)
    assert {id(p) for group in groups for p in group["params"] if group["weight_decay"] == 0.3} == matrices
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
