"""Clusters of two programs that share what they read, in Gluon and PTX, on two SMs at a time.

A copy to both programs reads L2 once, and writes a tile at the same place in the shared memory of each. Gluon has no
such copy in triton 3.6, and its `num_ctas=2` would divide every tensor between the programs. So a kernel is compiled
for single programs, `Clustered` launches them in clusters, and PTX does what spans both.

All warps of a cluster wait for each other twice (`sync_cluster`): at the start, until both programs have initialised
their mbarriers, and at the end, since a program that has exited has no shared memory to which the other could copy or
signal.

PTX needs addresses in shared memory, and the number of a descriptor among the kernel's parameters. Triton exposes
neither, so both are constants of the kernel, which `test_hopper_compiles.py` compares with the compiled code.
"""

# Annotations stay objects in this file (no `from __future__ import annotations`): Triton reads those of aggregates.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction

from ringflash.kernels.hopper_parts import next_tile

TRITON = "3.6"  # with which clusters ran on a GPU. Where others put tiles, and how they launch, could differ unnoticed.


class Clustered(GluonJITFunction):
    """A Gluon kernel whose programs run in clusters if its constant CLUSTER is not 0. Its grid then counts clusters."""

    def _do_compile(self, key, signature, device, constexprs, options, attrs, warmup):
        kernel = super()._do_compile(key, signature, device, constexprs, options, attrs, warmup)
        if kernel is not None and constexprs[(self.arg_names.index("CLUSTER"),)]:
            warps, _, shared = kernel.packed_metadata
            kernel.packed_metadata = (warps, 2, shared)  # from which the launcher takes the size of clusters
        return kernel


@gluon.jit
def rank():
    """0 or 1: this program's place in its cluster."""
    return gl.program_id(0) % 2


@gluon.jit
def sync_cluster():
    """Wait for all warps of both programs. Every warp of a program has to call it."""
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.release; barrier.cluster.wait.acquire; mov.u32 $0, $1;", "=r,r", [0 * rank()],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def idle():
    """A warp that only takes part in the two `sync_cluster` of every other warp."""
    sync_cluster()
    sync_cluster()


@gluon.jit
def publish_barriers():
    """Let the other program use the mbarriers that this warpgroup has initialised, after the next `sync_cluster`."""
    gl.inline_asm_elementwise(
        "fence.mbarrier_init.release.cluster; mov.u32 $0, $1;", "=r,r", [0 * rank()], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def signal_other(offset):
    """Arrive at the other program's mbarrier at `offset`. For a warp."""
    gl.inline_asm_elementwise(
        """{
            .reg .pred one;
            .reg .b32 at, other;
            mov.u32 at, global_smem;
            add.u32 at, at, $1;
            xor.b32 other, $2, 1;
            mapa.shared::cluster.u32 at, at, other;
            elect.sync _|one, 0xffffffff;
            @one mbarrier.arrive.shared::cluster.b64 _, [at];
            mov.u32 $0, $1;
        }""",
        "=&r,r,r", [offset, rank()], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def copy_asm(parameter):
    """PTX: copy 64 columns of a tile by the descriptor that is the kernel's parameter number `parameter` in PTX."""
    return f"""{{
        .reg .pred one;
        .reg .b16 both;
        .reg .b32 to, at;
        .reg .b64 descriptor;
        mov.b64 descriptor, forward_kernel_param_{parameter};
        cvta.param.u64 descriptor, descriptor;
        mov.u32 to, global_smem;
        add.u32 at, to, $6;
        add.u32 to, to, $5;
        mov.b16 both, 3;
        elect.sync _|one, 0xffffffff;
        @one cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
            [to], [descriptor, {{$4, $3, $2, $1}}], [at], both;
        mov.u32 $0, 0;
    }}"""


@gluon.jit
def copy_to_both(batch, head, row, column, tile, barrier, PARAMETER: gl.constexpr):
    """Start the copy of 64 columns of a tile to both programs: to offset `tile`, signalling those at `barrier`."""
    gl.inline_asm_elementwise(
        copy_asm(PARAMETER), "=&r,r,r,r,r,r,r", [batch, head, row, column, tile, barrier], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def fetch_asm(parameter):
    """PTX: fetch 64 columns of a tile into L2 by the descriptor that is the kernel's parameter number `parameter`."""
    return f"""{{
        .reg .pred one;
        .reg .b64 descriptor;
        mov.b64 descriptor, forward_kernel_param_{parameter};
        cvta.param.u64 descriptor, descriptor;
        elect.sync _|one, 0xffffffff;
        @one cp.async.bulk.prefetch.tensor.4d.L2.global.tile [descriptor, {{$4, $3, $2, $1}}];
        mov.u32 $0, 0;
    }}"""


@gluon.jit
def fetch(batch, head, row, COLUMNS: gl.constexpr, PARAMETER: gl.constexpr):
    """Start to fetch a tile of COLUMNS into L2, for a later copy."""
    for panel in gl.static_range(COLUMNS // 64):
        gl.inline_asm_elementwise(
            fetch_asm(PARAMETER), "=&r,r,r,r,r", [batch, head, row, 64 * panel], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def next_of_cluster(counter, number, total):
    """`next_tile` for a cluster: the next number of `total`, which both programs get. For one warp of each.

    Program 0 takes it and passes it on in memory, in one of two slots after the counter. It writes a slot again, for
    tile n + 2, when its consumers have ended tile n. Program 1 had read the slot by then, since it copied the values of
    tile n. 0 is an empty slot: numbers that are taken begin at the number of clusters.
    """
    thread = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    slot = counter + 1 + gl.program_id(0) // 2 * 2 + number % 2 + thread
    taken = 0 * number
    if rank() == 0:
        taken = next_tile(counter, total) - gl.num_programs(0) // 2
        gl.atomic_xchg(slot, thread * 0 + taken, mask=thread == 0, sem="relaxed")
    else:
        while taken == 0:
            found = gl.atomic_xchg(slot, thread * 0, mask=thread == 0, sem="relaxed")
            taken = gl.sum(gl.where(thread == 0, found, 0), 0)
    return taken


@gluon.jit
def wait_at(offset, phase, needed):
    """Wait at this program's mbarrier at `offset`, if `needed` is not 0.

    Before a wait of Gluon's in a loop, Triton adds a barrier of the whole warpgroup, which is not needed here.
    """
    gl.inline_asm_elementwise(
        """{
            .reg .pred done;
            .reg .b32 at;
            setp.eq.u32 done, $3, 0;
            @done bra DONE;
            mov.u32 at, global_smem;
            add.u32 at, at, $1;
            WAIT:
            mbarrier.try_wait.parity.shared::cta.b64 done, [at], $2;
            @!done bra WAIT;
            DONE:
            mov.u32 $0, 0;
        }""",
        "=&r,r,r,r", [offset, phase, needed], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
