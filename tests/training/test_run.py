"""train.py as a user starts it leaves what it promises, resumes after kill -9, and fails with one line."""

import json
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from ringflash.data import batch, load_corpus
from ringflash.errors import ConfigError
from ringflash.kernels import portable_parts
from ringflash.training import meter, metrics
from ringflash.training.checkpoints import checkpoint
from ringflash.training.compose import compose
from ringflash.training.metrics import read
from ringflash.training.preflight import check_inputs, unchecked
from tests import forked
from tests.training.launched import ENVIRONMENT, LIMIT, command, failing, run
from tests.training.runs import fitted, settings
from tests.training.test_config import EXPERIMENTS

pytestmark = pytest.mark.timeout(4 * LIMIT)


@pytest.mark.slow
def test_a_run_leaves_its_configuration_metrics_plot_checkpoints_wandb_run_and_model(text):
    needle = ["evaluation.needle.every=5", "evaluation.needle.lengths=[120]", "evaluation.needle.depths=[50]"]
    stdout, _ = run(["launch/torchrun.sh", "2", *settings(text, "name=whole", "logger.mode=offline", *needle)])
    folder = text.parent / "runs" / "whole"
    config, _ = compose([], folder=_as_config(folder))
    assert config.optim.steps == 6
    assert [r["step"] for r in read(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6, 6]
    for record in read(folder / "metrics.jsonl")[1:7]:
        # two layers, two ranks: a hop of keys each way, one of gradients for each half of the heads
        assert record["ring_hops"] == 2 * (1 + 1 + 2)
        assert record["ring_wait_seconds"] > 0
        assert record["ring_gib"] > 0
        assert "ulysses_gib" not in record
        assert 0 < record["pairs"] <= 2 * 64 * 65 / 2
        assert 0 <= record["imbalance"] < 1
    assert (folder / "loss.png").stat().st_size > 1000
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    pictures = [path.read_bytes() for path in folder.glob("wandb/offline-run-*/files/media/images/needle_*.png")]
    assert len(pictures) == 3  # of steps 0, 5 and 6
    assert (folder / "needle.png").read_bytes() in pictures
    ranks = "ranks      2 x CPU: replicas 1 x ring 2 x ulysses 1, layout auto; attention kernel blocked"
    written = (folder / name for name in ("model", "loss.png", "needle.png"))
    for line in (ranks, "held-out loss", "unigram entropy", *map(str, written)):
        assert line in stdout

    # plain transformers, its own attention, the same loss on the same documents
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="sdpa")
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token_id == 1
    _, held_out = load_corpus(config.data)
    total = count = 0
    for i in range(config.evaluation.sequences):
        sequence = batch(held_out, seed=0, step=i, batch_size=1, length=64)
        for piece, labels in zip(*(x[0].split(sequence.documents[0]) for x in (sequence.tokens, sequence.labels)),
                                 strict=True):  # fmt: skip
            logits = model(input_ids=piece[None]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            count += int((labels != -100).sum())
    assert read(folder / "metrics.jsonl")[-1]["held_out_loss"] == pytest.approx(total / count, rel=1e-5)


def _as_config(folder):
    """A configuration folder around a run's resolved config.yaml."""
    resolved = (folder / "config.yaml").read_text()
    (folder / "train.yaml").write_text("defaults: [schema, _self_]\n" + resolved)
    return folder


def killed_after_a_checkpoint(overrides):
    """A run that kill -9 ends once it has written a checkpoint."""
    save = checkpoint.save

    def save_and_die(*args, **options):
        save(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save = save_and_die
    return fitted(overrides)


@pytest.mark.ranks
def test_a_run_killed_half_way_and_resumed_equals_one_that_was_not_bit_for_bit(ranks, text):
    searches = ["evaluation.needle.every=3", "evaluation.needle.lengths=[120]", "evaluation.needle.depths=[50]"]
    arguments, folder = settings(text, "name=killed", "resume=auto", *searches), text.parent / "runs" / "killed"
    with pytest.raises(AssertionError, match=r"^rank . ended with exit code -9\nrank . ended with exit code -9$"):
        ranks.run(killed_after_a_checkpoint, 2, arguments)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    (error, stdout), _ = ranks.run(fitted, 2, arguments)
    assert error is None
    assert "resumed from" in stdout
    assert ranks.run(fitted, 2, settings(text, "name=straight", *searches))[0][0] is None
    straight = text.parent / "runs" / "straight"
    weights = [(f / "model" / "model.safetensors").read_bytes() for f in (straight, folder)]
    assert weights[0] == weights[1]
    losses = [[[r.get(name) for name in ("step", "loss", "held_out_loss", "needle_loss")]
               for r in read(f / "metrics.jsonl")] for f in (straight, folder)]  # fmt: skip
    assert losses[0] == losses[1]


def test_a_rank_that_raises_while_others_wait_in_the_ring_ends_the_run_with_its_line(text):
    assert failing(text, "raise") == ["ringflash: rank 1 failed: ArithmeticError: the fifth tile is broken"]


HANGING = {  # what rank 0 waits for, and where rank 1 hangs
    "parallel.ulysses=1": (
        "step 1, layer 1, backward, hop 1: waits for rank 1 to receive what it sent since ",
        "step 1: waits for no rank; its last wait was in layer 0, forward, hop 1",
    ),
    "parallel.ulysses=2": (
        "step 3, layer 0, forward, exchange of results: waits for rank 1 since ",
        "step 3: waits for no rank; its last wait was in layer 0, forward, exchange of values",
    ),
}


def test_a_rank_that_hangs_ends_the_run_with_a_line_of_every_rank(text):
    def lines_of(grid):  # both runs at once, since they mostly wait
        return failing(text, "hang", "parallel.hop_timeout_seconds=2", grid)

    with ThreadPoolExecutor() as threads:
        found = dict(zip(HANGING, threads.map(lines_of, HANGING), strict=True))
    for grid, (waiting, hanging) in HANGING.items():
        assert found[grid][0].startswith(f"ringflash: rank 0, {waiting}"), grid
        assert found[grid][1:] == [f"ringflash: rank 1, {hanging}"], grid


BAD_INPUT = {
    "missing-data": (["data.path=/nowhere"], "data.path=/nowhere does not exist"),
    "vocabulary": (
        ["model.architecture.vocab_size=100", "data.format=jsonl"],  # refused before text is read as JSON
        "data.tokenizer=bytes has 384 tokens, more than the model's model.architecture.vocab_size=100",
    ),
    "short-sequence": (
        ["data.sequence_length=3"], "data.sequence_length=3 is smaller than 2 x 2 ranks that share it",
    ),
    "heads": (
        ["model.architecture.num_key_value_heads=3"],
        "model.architecture.num_attention_heads=4 is not divisible by num_key_value_heads=3",
    ),
    "kernel": (
        ["attention.kernel=hopper"],
        "attention.kernel=hopper needs a GPU of compute capability 9.0, got device cpu; "
        "attention.kernel=auto takes what runs there",
    ),
    "experiment": (
        ["experiment=unknown"],
        "experiment=unknown is not one of 128k, 128k-8gpus, 1m, 1m-8gpus, 256k, 256k-8gpus, 512k, 512k-8gpus, debug, "
        "llama3-8b-128k, llama3-8b-128k-8gpus, llama3-8b-256k, llama3-8b-256k-8gpus, llama3-8b-400k, "
        "llama3-8b-400k-8gpus, qwen3-0.5b-128k",
    ),
}  # fmt: skip


@pytest.mark.ranks
@pytest.mark.parametrize(("others", "line"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_alike_on_every_rank(ranks, text, others, line):
    assert [error for error, _ in ranks.run(fitted, 2, settings(text, *others))] == [line] * 2


@pytest.mark.parametrize("case", ["every-rank", "rank-0"])
def test_bad_input_ends_a_run_with_one_line(text, case):
    """Every rank refuses a model before they are connected; rank 0 alone tries to write to output_dir."""
    runs = f"{text}/0.txt/runs"
    others, line = {
        "every-rank": BAD_INPUT["heads"],
        "rank-0": ([f"output_dir={runs}"], f"output_dir={runs} cannot be written: Not a directory"),
    }[case]
    result = forked.run(command(text, *others), env=ENVIRONMENT, timeout=LIMIT)
    assert result.returncode == 1, result
    assert [one for one in result.stderr.splitlines() if "ringflash:" in one] == [f"ringflash: {line}"]
    assert "Traceback" not in result.stderr


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("experiment", "small"),
    [
        ("llama3-8b-128k", ["model.dtype=bf16"]),
        ("llama3-8b-256k-8gpus", []),
        ("128k", []),
        ("1m", ["model.dtype=bf16", "memory.layer_inputs=host:1", "memory.attention_results=host:1"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_large_experiment_takes_two_steps_on_the_cpu_with_a_small_model(ranks, text, experiment, small):
    others = [f"experiment={experiment}", "model=tiny-llama", "optim.steps=2", "name=short", *small]
    (error, stdout), _ = ranks.run(fitted, 2, settings(text, *others))
    assert error is None
    assert "held-out loss" in stdout


@pytest.mark.ranks
def test_the_debug_experiment_does_all_that_a_run_does_on_few_tokens(ranks, tmp_path):
    others = [f"output_dir={tmp_path}", f"data.cache={tmp_path}/cache", "experiment=debug"]
    config, _ = compose(others)
    assert config.optim.steps * config.optim.batch * config.data.sequence_length <= 1024
    ((error, stdout),) = ranks.run(fitted, 1, others)
    assert error is None
    model = re.search(r"^model +llama, ([0-9,]+) parameters in fp32$", stdout, re.MULTILINE)
    assert int(model[1].replace(",", "")) < 100_000
    assert re.search(
        r"^data .* \(source text of Python's standard library; .*\), tokenizer bytes$", stdout, re.MULTILINE
    )
    folder = tmp_path / "debug"
    assert ["held_out_loss" in record for record in read(folder / "metrics.jsonl")] == [True, *[False, True] * 2, True]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert (folder / "model" / "model.safetensors").exists()


@pytest.mark.ranks
def test_a_corpus_of_one_document_trains_with_nothing_held_out(ranks, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "book.txt").write_text("a long book. " * 100)
    others = ["data.held_out=0", "evaluation.every=1", "optim.steps=2", "name=one"]
    (error, stdout), _ = ranks.run(fitted, 2, settings(tmp_path / "text", *others))
    assert error is None
    assert "held-out loss" not in stdout
    assert "loss plot" in stdout
    records = read(tmp_path / "runs" / "one" / "metrics.jsonl")
    assert [(r["step"], "held_out_loss" in r) for r in records] == [(1, False), (2, False)]


@pytest.mark.ranks
def test_a_run_killed_after_its_last_checkpoint_has_its_last_record_once_when_resumed(ranks, text):
    arguments = settings(text, "optim.steps=2", "name=late", "resume=auto")
    file = text.parent / "runs" / "late" / "metrics.jsonl"
    assert ranks.run(fitted, 1, arguments)[0][0] is None
    complete = file.read_text()
    file.write_text("".join(line for line in complete.splitlines(True) if "unigram_entropy" not in line))
    for _ in range(2):  # the second finds the run complete
        assert ranks.run(fitted, 1, arguments)[0][0] is None
        assert file.read_text() == complete


def metrics_files_read(overrides):
    """How often this rank reads a metrics.jsonl during a run."""
    reads, real = [], metrics.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "read", lambda path: reads.append(path) or real(path))
        error, _ = fitted(overrides)
    assert error is None
    return len(reads)


@pytest.mark.ranks
def test_rank_0_alone_reads_the_metrics_of_a_run(ranks, text):
    first, second = ranks.run(metrics_files_read, 2, settings(text, "optim.steps=1", "name=read", "resume=auto"))
    assert first > 0
    assert second == 0


@pytest.mark.ranks
def test_a_plot_that_could_not_be_written_at_the_end_is_refused_before_the_first_step(ranks, text):
    folder = text.parent / "runs" / "blocked"
    (folder / "loss.png").mkdir(parents=True)
    ((error, _),) = ranks.run(fitted, 1, settings(text, "name=blocked", "resume=auto"))
    assert error.startswith(f"{folder}/loss.png was not written: ")
    assert read(folder / "metrics.jsonl") == []


def fitted_with_memory(overrides):
    """`fitted`, where each rank has its number as GiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meter, "memory_gib", lambda device: float(dist.get_rank()))
        return fitted(overrides)


@pytest.mark.ranks
def test_the_record_counts_what_all_ranks_received_and_the_most_memory_of_any(ranks, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "book.txt").write_text("a long book. " * 100)
    others = ["data.held_out=0", "optim.steps=1", "parallel.ulysses=2", "parallel.layout=contiguous", "name=counted"]
    assert {error for error, _ in ranks.run(fitted_with_memory, 4, settings(tmp_path / "text", *others))} == {None}
    (record,) = read(tmp_path / "runs" / "counted" / "metrics.jsonl")
    assert record["memory_gib"] == 3
    # Of 64 tokens the second half sees the first: its keys move twice, its gradients once. Two layers; of each token,
    # keys and values of two heads of 8 in fp32, of which either of a row's two ranks has one.
    assert record["ring_gib"] * 2**30 == 2 * (3 * 32) * (2 * 2 * 8 * 4)
    # Four ranks swap half of their 16 tokens' q, out and their gradients, keys, values and theirs; and delta.
    assert record["ulysses_gib"] * 2**30 == 2 * 4 * 16 // 2 * (4 * 4 * 8 + 4 * 2 * 8 + 4) * 4
    assert record["ulysses_wait_seconds"] > 0


@pytest.mark.ranks
def test_a_grid_and_a_layout_that_are_chosen_are_logged_with_their_reasons(ranks, text):
    (error, stdout), _ = ranks.run(fitted, 2, settings(text, "parallel=auto", "optim.steps=2", "name=chosen"))
    assert error is None
    assert "parallel: ulysses=" in stdout
    assert "the least predicted time of all layers' attention (1 x 2: " in stdout
    assert "parallel: a step's layout is " in stdout


@pytest.mark.ranks
def test_an_empty_data_folder_is_refused(ranks, tmp_path):
    (tmp_path / "text").mkdir()
    ((error, _),) = ranks.run(fitted, 1, settings(tmp_path / "text"))
    assert error == f"data.path={tmp_path}/text data.files=['**/*.txt', '**/*.txt.gz', '**/*.txt.zst'] match no file"


def test_more_ranks_than_gpus_are_refused_with_both_numbers(monkeypatch):
    from ringflash.distributed import world
    from ringflash.distributed.parallel import ParallelConfig

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"8 ranks on .* but 4 GPUs: .*--nproc-per-node 4"):
        world.join(ParallelConfig())


def test_print_shows_a_configuration_that_can_be_read_back():
    result = forked.run([sys.executable, "train.py", "--print", "optim.lr=1e-5"])
    assert "lr: 1.0e-05" in result.stdout
    assert OmegaConf.create(result.stdout).optim.lr == 1e-5
    assert result.stderr.splitlines()[-3:] == unchecked(None)


def test_print_lists_what_it_leaves_to_the_run(monkeypatch):
    records, ranks, gpu = unchecked(None)
    assert re.match(r"unchecked  records behind the first", records)
    assert re.match(r"unchecked  ranks and memory: .* WORLD_SIZE=8", ranks)
    assert re.match(r"unchecked  attention\.kernel and fused\.\*, .*: this machine has none", gpu)
    assert unchecked(torch.device("cuda")) == [records, ranks]
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert unchecked(None) == [records, gpu]


REFUSED_BY_PRINT = {
    "model": (["+model.architecture.attention_dropout=0.1"], "attention_dropout=0.1 is not supported"),
    "length": (["data.sequence_length=9000"], "data.sequence_length=9000 is more than the 8192 positions"),
    "data": (["data.path=/nowhere"], "data.path=/nowhere does not exist"),
    "files": (["data.files=['*.nothing']"], "match no file"),
    "tokenizer": (["data.tokenizer=/nowhere"], "data.tokenizer=/nowhere is neither bytes nor a folder"),
    "layers": (["memory=host", "memory.layer_inputs=host:3"], "memory.layer_inputs=host:3: the model has 2 layers"),
    "experts": (
        ["memory=recompute", "memory.mlp_tile=64", "model.architecture.model_type=mixtral"],
        "memory.mlp_tile=64: no MLP of model_type=mixtral has a form that can be tiled",
    ),
    "needle": (["evaluation.needle.lengths=[99]"], "evaluation.needle.lengths=[99] has no effect with evaluation.n"),
    "batch": (["optim.batch=3", "optim.micro_batch=2"], "optim.batch=3 is not a multiple of 1 replicas x optim.micro"),
    "vocabulary": (["model.architecture.vocab_size=100"], "data.tokenizer=bytes has 384 tokens, more than the model's"),
}


@pytest.mark.parametrize(("others", "message"), REFUSED_BY_PRINT.values(), ids=REFUSED_BY_PRINT)
def test_print_refuses_what_a_run_would(others, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_inputs(compose(others)[0])


def test_what_must_be_fused_is_refused_on_the_cpu():
    for name in ("norm", "rotary", "mlp", "loss", "optimizer"):
        with pytest.raises(ConfigError, match=rf"^fused\.{name}=always needs a GPU, .* got device cpu"):
            check_inputs(compose([f"fused.{name}=always"])[0], torch.device("cpu"))


def test_print_leaves_it_to_the_run_whether_a_kernel_can_run_where_there_is_no_gpu():
    check_inputs(compose(["attention.kernel=hopper"])[0])


def test_print_refuses_a_kernel_that_this_machines_gpu_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(portable_parts, "_arch", lambda device: 80)
    config, _ = compose(["attention.kernel=hopper"])
    message = r"^attention\.kernel=hopper needs .* 9\.0, got one of 8\.0;"
    with FakeTensorMode(), pytest.raises(ConfigError, match=message):
        check_inputs(config, torch.device("cuda"))


@pytest.mark.parametrize("experiment", [None, *(name for name in EXPERIMENTS if name != "debug")])
def test_every_experiment_trains_on_positions_that_its_model_knows(text, experiment):
    chosen = [f"experiment={experiment}", "data=text", f"data.path={text}"] if experiment else []
    config, _ = compose(chosen)
    check_inputs(config)
    positions = config.model.architecture["max_position_embeddings"]
    longer = f"data.sequence_length={positions + 1}"
    with pytest.raises(ConfigError, match=rf"^{longer} is more than the {positions} positions"):
        check_inputs(compose([*chosen, longer])[0])
    check_inputs(compose([*chosen, longer, "model.extrapolate_positions=true"])[0])


def test_a_metrics_line_cut_short_by_a_kill_is_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read(path) == [{"step": 1, "loss": 2.0}]
