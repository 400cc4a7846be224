"""A grid or layout that the settings leave open is chosen from heads, GPUs, length and documents, and can run."""

import pytest
from transformers import AutoConfig

from ringflash import IntervalMask, Layout
from ringflash.distributed.parallel import ParallelConfig, layout_chooser, resolve_parallel
from ringflash.errors import ConfigError
from ringflash.layout import LAYOUT_NAMES

LLAMA_8B = AutoConfig.for_model(
    "llama", hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32
)
ODD_HEADS = AutoConfig.for_model("qwen3", num_attention_heads=14, num_key_value_heads=7, head_dim=64)
OPEN = ParallelConfig(ulysses=None)


def test_ulysses_stays_in_a_node_and_replicates_no_kv_heads():
    for ranks, per_node in ((16, 8), (32, 4), (64, 8)):
        parallel, why = resolve_parallel(OPEN, LLAMA_8B, 65536, ranks, per_node)
        assert per_node % parallel.ulysses == 0
        assert 8 % parallel.ulysses == 0
        assert f"ulysses={parallel.ulysses} x ring={ranks // parallel.ulysses}" in why
    assert resolve_parallel(OPEN, ODD_HEADS, 65536, 8, 8)[0].ulysses == 1


def test_a_given_grid_stays_and_is_refused_where_heads_do_not_divide():
    given = ParallelConfig(ulysses=2)
    assert resolve_parallel(given, LLAMA_8B, 65536, 8, 8) == (given, None)
    with pytest.raises(ConfigError, match=r"parallel\.ulysses=4: 14 query heads do not divide among ulysses=4 ranks"):
        resolve_parallel(ParallelConfig(ulysses=4), ODD_HEADS, 65536, 8, 8)


def test_heads_are_not_exchanged_between_machines():
    with pytest.raises(ConfigError, match=r"parallel\.ulysses=8 does not divide the 4 ranks of this machine"):
        resolve_parallel(ParallelConfig(ulysses=8), LLAMA_8B, 65536, ranks=32, ranks_per_node=4)


@pytest.mark.parametrize(
    ("grid", "ranks_per_node", "link"),
    [
        ((8, 1), 8, "node"),  # replicas of 8 on machines of 8, however many there are
        ((4, 2), 16, "node"),
        ((4, 2), 4, "across"),  # a replica on two machines: its rings cross
        ((16, 1), 8, "across"),
        ((4, 1), 6, "across"),  # ranks 4 to 7 form a ring
    ],
)
def test_predicted_times_use_the_bandwidth_of_the_links_that_a_ring_uses(grid, ranks_per_node, link):
    """Over the slow link of the two, packed documents are better left in contiguous runs."""
    mask = IntervalMask.causal(65536) & IntervalMask.documents([40000, 1000, 24536])
    speeds = {"intra_node_bandwidth_gb": 300.0, "inter_node_bandwidth_gb": 1e-4}
    config = ParallelConfig(layout="auto", ulysses=grid[1], **speeds)
    layout = layout_chooser(config, LLAMA_8B, grid[0], ranks_per_node)(mask)
    slow = layout.chunks.equal(Layout.contiguous(65536, grid[0], grid[1]).chunks)
    assert slow == (link == "across")


def test_auto_gives_each_step_the_layout_its_documents_want():
    layout_for = layout_chooser(ParallelConfig(layout="auto"), LLAMA_8B, 8, ranks_per_node=8)
    causal = IntervalMask.causal(65536)
    uneven = causal & IntervalMask.documents([40000, 1000, 24536])
    assert layout_for(causal).chunks.equal(Layout.zigzag(65536, 8).chunks)
    assert layout_for(uneven).imbalance(uneven) <= 0.03


def test_auto_logs_its_reason_once_per_layout():
    lines = []
    layout_for = layout_chooser(ParallelConfig(layout="auto"), LLAMA_8B, 8, ranks_per_node=8, log=lines.append)
    causal = IntervalMask.causal(65536)
    uneven = causal & IntervalMask.documents([40000, 1000, 24536])
    for mask in (causal, uneven, causal, uneven):
        layout_for(mask)
    assert [line.split(",")[0] for line in lines] == [
        "parallel: a step's layout is zigzag",
        "parallel: a step's layout is balanced",
    ]
    assert "contiguous: " in lines[0]
    assert "document_local 0.25: " in lines[0]


def test_auto_takes_into_account_a_window_that_all_layers_have():
    mistral = AutoConfig.for_model("mistral", sliding_window=512)
    layout_for = layout_chooser(ParallelConfig(layout="auto"), mistral, 8, ranks_per_node=8)
    assert layout_for(IntervalMask.causal(65536)).chunks.equal(Layout.contiguous(65536, 8).chunks)


@pytest.mark.parametrize("name", ["auto", *LAYOUT_NAMES])
@pytest.mark.parametrize("ulysses", [1, 2])
def test_every_layout_divides_among_the_ranks_of_ulysses(name, ulysses):
    layout_for = layout_chooser(ParallelConfig(layout=name, ulysses=ulysses), LLAMA_8B, 4, ranks_per_node=8)
    layout = layout_for(IntervalMask.causal(1001) & IntervalMask.documents([700, 301]))
    assert layout.ranks == 4
    assert layout.split(ulysses).ranks == 4 * ulysses
