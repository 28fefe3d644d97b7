#!/usr/bin/env python3
"""Count the instructions in the inner loops of the CUDA kernels on sm_90a, and predict times from them, without a GPU.

    cargo test --release --locked --test cuda_kernels      # leaves the kernels' PTX in target/cuda/kernels
    benches/kernel_counts.py [--all | --write]

PTX is assembled by ptxas (`make install-cuda-compiler`) and disassembled by nvdisasm, which is downloaded from PyPI to
target/disassembler if it is not there. Instructions of an inner loop are counted only there. Both sides of a branch are counted, taken
or not. Printed are the loops with tensor-core products, of other kernels the loop with most memory accesses and arithmetic, of kernels
without a loop the whole kernel; with --all every loop. --write puts the tables into docs/performance/hopper.md between its marks.

The times are estimates: the largest of bytes, tensor cores, shared memory and issue slots, with the constants below, plus launches. They
are for comparison with measurements.
"""
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
NVDISASM = "13.2.78"
TOOLS = ROOT / "target/cuda/nvidia/cu13/bin"
DISASSEMBLER = ROOT / "target/disassembler"
PAGE = ROOT / "docs/performance/hopper.md"
MARKS = ("<!-- counts: benches/kernel_counts.py --write -->\n", "<!-- end of counts -->\n")

# An H200: multiprocessors, clocks per microsecond, bytes per microsecond of a copy, clocks per HMMA 16x8x16 of a quarter
# (0.63 of wgmma's rate, arXiv 2402.13499), microseconds per launch in a graph and until a block's first bytes arrive.
SMS, CLOCK, COPY, HMMA, LAUNCH, LATENCY = 132, 1700.0, 4.3e6, 6.4, 1.5, 1.5
# Bytes per microsecond that one multiprocessor loads if the others are idle.
ALONE = 80e3
# Microseconds of a load that the next step waits for: from memory, and from L2, which has the batch's words and the previous
# kernel's results.
WAIT, NEAR = 0.7, 0.3
# The fraction of its issue slots that a kernel uses if its few warps wait at barriers.
ISSUED = 0.63
# Instructions of a warp on the path of nearly all chunks, tokens or rows: a full chunk, anchored in its middle and not the
# first of its segment; bf16 weights; one row. Counted by hand in the listing, whose branches and loops contain more. A decode with
# projections: 1,170 without them, eight turns of 65, and about 180 for the copies.
ALONG = {"kda_prepare_fused_128": 2870, "kda_decode_projected": 1870, "mla_absorb": 760, "mla_merge": 850, "mla_merge, four rows": 1800}
# Clocks per scanned chunk, of which 430 are products: docs/performance/hopper.md, "KDA prefill".
SCANNED = 680
# Instructions of a warp on the path for multiples of eight and bf16 weights, counted by hand in the listing: five iterations
# of two groups of 256 columns for an expert and eight rows; one token's choice of 8 of 256.
ALONG_ROUTE = {"route_scores": 2220, "route_choose": 1450}
# Microseconds of a single warp: 72 dependent products and five shuffles; the ranks of 256 experts, then eight times the best
# of them, two reductions and a pass of shared memory each; a list of 512 assignments by expert.
DOT, CHOICE, LIST = 0.25, 1.2, 2.0
# Operations per microsecond: the rate of mma.sync for tiles of experts (FA2 reaches 350e6), and of a large product of so few
# tiles that half of the multiprocessors have one.
TILES, FEW_TILES = 400e6, 400e6

KINDS = ["HMMA", "LDSM", "LDS", "STS", "LDG", "LDGSTS", "UBLKCP", "STG", "MUFU", "FFMA", "BAR"]
WORD = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)(.*)$")
LABEL = re.compile(r"^(\.L_x_\d+):")


def sh(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]}: {done.stderr[-2000:]}")
    return done.stdout


def disassembler():
    path = DISASSEMBLER / "nvidia/cu13/bin/nvdisasm"
    if not path.exists():
        sh(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:",
           "--root-user-action", "ignore", "--target", DISASSEMBLER, f"nvidia-cuda-nvdisasm=={NVDISASM}")
    return path


def wavefronts(name, rest):
    """Number of 128-byte accesses of shared memory for a warp, without conflicts."""
    if name.startswith("LDSM"):
        return 4 if ".4" in name else 2 if ".2" in name else 1
    if name.startswith("LDGSTS") or ".128" in name:
        return 4
    return 2 if ".64" in name else 1


def kind_of(name):
    base = name.split(".")[0]
    if base in ("FFMA", "FADD", "FMUL"):
        return "FFMA"
    if base in ("BAR", "SYNCS"):
        return "BAR"
    return base if base in KINDS else "other"


class Count:
    def __init__(self):
        self.kinds = dict.fromkeys([*KINDS, "other"], 0)
        self.wavefronts = 0

    def add(self, name, rest):
        kind = kind_of(name)
        self.kinds[kind] += 1
        if kind in ("LDSM", "LDS", "STS", "LDGSTS"):
            self.wavefronts += wavefronts(name, rest)

    def more(self, other, times):
        self.wavefronts += times * other.wavefronts
        for kind, count in other.kinds.items():
            self.kinds[kind] += times * count

    @property
    def all(self):
        return sum(self.kinds.values())


class Loop:
    """The words of a loop's blocks, by number; the kernel itself is one as well."""

    def __init__(self, begin, blocks):
        self.begin, self.blocks, self.depth, self.count = begin, blocks, 0, Count()


def natural_loops(words, labels):
    """Blocks of words, and the loops among them: an edge back to a block that is on every path there (Aho, Lam, Sethi, Ullman, 9.6)."""
    place = {at: i for i, (at, *_) in enumerate(words)}
    targets = {}
    for i, (at, guard, op, rest) in enumerate(words):
        target = re.search(r"`\((\.L_x_\d+)\)", rest)
        if op.startswith("BRA") and target and labels.get(target.group(1)) in place:
            targets[i] = place[labels[target.group(1)]]
    ends = {i for i, (_, _, op, _) in enumerate(words) if op.split(".")[0] in ("BRA", "EXIT", "RET", "BRX")}
    leaders = sorted({0, *targets.values(), *(i + 1 for i in ends if i + 1 < len(words))})
    number = {leader: n for n, leader in enumerate(leaders)}
    blocks, nexts = [], []
    for n, leader in enumerate(leaders):
        last = (leaders[n + 1] if n + 1 < len(leaders) else len(words)) - 1
        blocks.append(range(leader, last + 1))
        after = [number[targets[last]]] if last in targets else []
        if (last not in ends or words[last][1]) and last + 1 < len(words):
            after.append(number[last + 1])
        nexts.append(after)
    before = [[] for _ in blocks]
    for n, after in enumerate(nexts):
        for m in after:
            before[m].append(n)
    reached, waiting = {0}, [0]
    while waiting:
        for m in nexts[waiting.pop()]:
            if m not in reached:
                reached.add(m)
                waiting.append(m)
    everyone = sum(1 << n for n in reached)
    dominators = [1 if n == 0 else everyone for n in range(len(blocks))]
    changed = True
    while changed:
        changed = False
        for n in sorted(reached - {0}):
            common = everyone
            for m in before[n]:
                if m in reached:
                    common &= dominators[m]
            common |= 1 << n
            changed |= common != dominators[n]
            dominators[n] = common
    loops = {}
    for n in reached:
        for header in nexts[n]:
            if dominators[n] >> header & 1:
                body, waiting = loops.setdefault(header, {header}), [n]
                while waiting:
                    m = waiting.pop()
                    if m not in body:
                        body.add(m)
                        waiting += [o for o in before[m] if o in reached]
    return blocks, reached, loops


def kernels_of(text):
    """Each entry's loops, the whole kernel first."""
    for section in text.split(".section\t.text.")[1:]:
        name, labels, words, waiting = section.split(",")[0], {}, [], []
        for line in section.splitlines():
            label = LABEL.match(line)
            if label:
                waiting.append(label.group(1))
            word = WORD.match(line)
            if word:
                at = int(word.group(1), 16)
                labels.update(dict.fromkeys(waiting, at))
                waiting = []
                words.append((at, word.group(2), word.group(3), word.group(4)))
        blocks, reached, bodies = natural_loops(words, labels)
        loops = [Loop(0, reached), *(Loop(words[blocks[header][0]][0], body) for header, body in sorted(bodies.items()))]
        for n in reached:
            loop = min((loop for loop in loops if n in loop.blocks), key=lambda loop: len(loop.blocks))
            for i in blocks[n]:
                _, guard, op, rest = words[i]
                if op != "NOP":
                    # An instruction that never runs only uses an issue slot.
                    loop.count.add("other" if guard == "@!PT" else op, rest)
        for loop in loops[1:]:
            loop.depth = sum(loop.blocks <= other.blocks for other in loops) - 1
        yield name, loops


def chosen(loops):
    tensor = [loop for loop in loops if loop.count.kinds["HMMA"]]
    if tensor or len(loops) == 1:
        return tensor or loops
    weight = lambda loop: sum(loop.count.kinds[kind] for kind in ("LDG", "LDS", "STS", "STG", "FFMA", "MUFU"))
    return [max(loops[1:], key=weight)]


def main_loop(name, loops):
    """The smallest loop that holds all products, and its count with those within it."""
    tensor = [loop for loop in loops[1:] if loop.count.kinds["HMMA"]]
    everywhere = set().union(*(loop.blocks for loop in tensor)) if tensor else loops[0].blocks
    loop = min((loop for loop in loops if everywhere <= set(loop.blocks)), key=lambda loop: len(loop.blocks))
    count = Count()
    for other in {id(o): o for o in [loop, *(o for o in tensor if set(o.blocks) < set(loop.blocks))]}.values():
        count.more(other.count, 1 if other is loop else TRIPS.get(name, 1))
    return loop, count


# The work of a warp in one iteration of the loop with most products, the number of HMMAs without pairs of a bf16 and its
# rounding error, and the actual number at the published widths, where a branch skips some. Number of iterations of an inner
# loop.
TRIPS = {"mla_prefill_192": 3, "mla_prefill_64": 1}
UNITS = {
    "mla_attend_512": ("32 positions, 16 heads by a quarter of the columns, then 32 heads by 64", 36 + 32, 104),
    "mla_prefill_192": ("32 queries by 32 positions: softmax and values, keys below", 96 + 64, 160),
    "experts_many_in": ("64 assignments by 2 x 32 columns, 32 deep", 64, 64),
    "experts_many_out": ("64 assignments by 64 columns, 32 deep", 64, 64),
}


def model(found):
    """Rows: the work, times by bytes, tensor cores, shared memory, issue; predicted, the floor. Microseconds, one layer."""
    rows = []

    def row(what, kernel, turns, warps, volume, floor, launches=1, alone=0):
        """`turns` iterations of a loop on the multiprocessor with most of them, by blocks of this number of warps;
        `volume` bytes of the device, `alone` of that multiprocessor."""
        parts = [0, 0, 0]
        if kernel in found:
            count = main_loop(kernel, found[kernel])[1]
            hmma = UNITS[kernel][2] if kernel in UNITS else count.kinds["HMMA"]
            parts = [hmma * warps / 4 * HMMA, count.wavefronts * warps, count.all * warps / 4]
            parts = [clocks * turns / CLOCK for clocks in parts]
        elif kernel:
            return 0, 0, 0
        by_bytes = max(volume / COPY, alone / ALONE)
        # These overlap if there are enough warps; a tenth is added for the part that does not.
        predicted = 1.1 * max(by_bytes, *parts) + launches * LAUNCH + LATENCY
        rows.append((what, by_bytes, *parts, predicted, floor))
        return by_bytes, parts[2], predicted

    def launch(waits=0.0, volume=0.0, single=0.0, instructions=0, warps=0, issued=1.0, more=1.1):
        """Bytes, issue and prediction of one kernel: its dependent loads, then the longer of bytes (of the device; `single` of the
        multiprocessor with most) and of the issue slots of that multiprocessor, and a tenth if that is not in them."""
        by_bytes, by_issue = max(volume / COPY, single / ALONE), instructions * warps / 4 / CLOCK / issued
        return by_bytes, by_issue, LAUNCH + waits + more * max(by_bytes, by_issue)

    def together(what, floor, *kernels):
        by_bytes, by_issue, predicted = map(sum, zip(*kernels))
        rows.append((what, by_bytes, 0, 0, by_issue, predicted, floor))

    heads, chunks = 32, 512
    key = 8192 * heads * 128 * 2
    images = chunks * heads * (33 * 512 + 512 + 8 * 528)
    prepare = launch(0, 4 * key + images, 0, ALONG["kda_prepare_fused_128"], 4 * chunks * heads / SMS, ISSUED, 1)
    scan = launch(0, images + key, 0, SCANNED * chunks, 4, 1, 1)
    # Two bytes per access: three fifths of a copy's rate.
    norm = launch(0, 3 * key / 0.6, more=1)
    together("KDA prefill, 8K tokens: prepare, from before the convolution", (4 * key + images) / 4.8e6, prepare)
    together(".. scan", (images + key) / 4.8e6, scan)
    together("KDA layer from convolution to norm, 8K tokens", 6 * key / 4.8e6, prepare, scan, norm)
    for sequences in (1, 64):
        blocks = -(-heads * sequences // SMS)
        # The second projections of decay and output gate are read from memory once, and by each block.
        projections = heads * 2 * 128 * 128 * 2
        volume = sequences * heads * 128 * (2 * 128 * 4 + 4 * 2 + 2 * 9 * 4) + projections
        together(f"KDA decode, {sequences} sequence{'s' if sequences > 1 else ''}", volume / 4.8e6, launch(
            2 * NEAR + WAIT, volume, (131072 + projections / heads) * blocks, ALONG["kda_decode_projected"], 8 * blocks))
    kv_b = 2 * 32 * 256 * 512
    for positions, name in ((4096, "4K"), (32768, "32K"), (131072, "128K"), (1048576, "1M")):
        span = max(256, -(-(-(-positions // 132)) // 32) * 32)
        spans = -(-positions // span)
        volume = positions * 1152 + spans * 32 * 516 * 4
        attend = row(f"MLA decode, one row after {name}: attend", "mla_attend_512", span / 32, 8, volume, positions * 1152 / 4.8e6,
                     alone=span * 1152 + 32 * 516 * 8)
        # Rows, query; then spans' words, their parts, their weights.
        absorb = launch(3 * NEAR, kv_b / 2, 0, ALONG["mla_absorb"], 8)
        merge = launch(4 * NEAR, 0, spans * 516 * 4 + kv_b / 64, ALONG["mla_merge"] + 110 * (spans // 32), 16)
        together(".. with absorb and merge", (positions * 1152 + kv_b) / 4.8e6, absorb, attend, merge)
    attend = row("MLA decode, 64 rows after 4K each: attend", "mla_attend_512", 64 * 128 / SMS, 8, 64 * (4096 * 1152 + 16 * 32 * 516 * 4),
        64 * 4096 * 1152 / 4.8e6)
    # Sixteen groups of four rows: 2,048 blocks and 512.
    absorb = launch(3 * NEAR, kv_b / 2, 0, ALONG["mla_absorb"], 8 * 16)
    merge = launch(4 * NEAR, 64 * 16 * 32 * 516 * 4 + kv_b / 2, 0, ALONG["mla_merge, four rows"], 16 * 4)
    together(".. with absorb and merge", (64 * 4096 * 1152 + kv_b) / 4.8e6, absorb, attend, merge)
    for tokens in (8192, 131072):
        # Causal, in iterations of 32 by 32 of eight warps.
        turns = 32 * (tokens / 32) * (tokens / 32 + 1) / 2 / 8 / SMS
        row(f"MLA prefill, {tokens // 1024}K tokens: attention alone", "mla_prefill_192", turns, 8, tokens * 2e4, 10240 * tokens**2 / 790e6)
    places, width, hidden = 65536, 2304, 1024
    # Latents are gathered, expanded in f32 by a dense product, laid out as images: each step reads and writes them.
    row("MLA prefill, 8K tokens: gather, expansion, images", None, 0, 0, 8192 * (1152 + 2 * 1024 + 2 * 32768 + 32 * 57344 / 64), 0, 6)
    def tiles(what, kernel, turns, volume, operations):
        """A product of tiles on mma.sync, at the rate that such products have reached, not at that of the listing."""
        row(what, kernel, turns, 4, volume, operations / 790e6)
        if rows[-1][0] == what:
            rows[-1] = (*rows[-1][:5], operations / TILES + LAUNCH + LATENCY, rows[-1][6])

    tiles("experts, 8,192 tokens, 256 assignments each: gate and up", "experts_many_in", 512 * hidden / 64 * width / 32 / SMS,
          256 * 4 * width * hidden + places * 2 * (width + hidden), 4 * places * width * hidden)
    tiles(".. down", "experts_many_out", 512 * width / 128 * hidden / 32 / SMS,
          256 * 2 * width * hidden + places * (2 * hidden + 4 * width), 2 * places * width * hidden)
    # Assignments are read three times, in rounds of eight dependent loads.
    combined = places * 4 * width + 8192 * 2 * width
    together(".. count, sort, combine", 0, launch(8 * NEAR), launch(3 * 8 * NEAR), launch(NEAR, combined))
    for count, experts in ((1, 8), (64, 222)):
        rows_of = "one row" if count == 1 else f"{count} single rows"
        # The batch's words, the row, its choice; or the batch's words and the list.
        waits = WAIT + (3 if count == 1 else 2) * NEAR
        kernels = [launch(waits, experts * 2 * part * width * hidden + count * 8 * 2 * (width + hidden)) for part in (2, 1)]
        if count > 1:
            kernels.append(launch(3 * NEAR + LIST))
        kernels.append(launch(3 * NEAR, count * 8 * 4 * width))
        together(f"experts, {rows_of} ({experts} experts): {'list, ' if count > 1 else ''}in, out, combine", experts * 14155776 / 4.8e6, *kernels)
    router = 2 * 256 * width
    choose = launch(NEAR + WAIT + CHOICE)
    # One launch: a dot product, the count of the blocks, then the last block's choice.
    together("router, one row: scores, choice", (router + 2 * width) / 4.8e6,
             launch(2 * WAIT + 3 * NEAR + DOT + CHOICE, router, 4 * width))
    together("router, 64 single rows", (router + 128 * width) / 4.8e6,
             launch(3 * NEAR, router, 0, ALONG_ROUTE["route_scores"], 2048 / SMS, ISSUED, 1), choose)
    product = 2 * 8192 * 256 * width
    scored = router + 8192 * (2 * width + 4 * 256)
    together("router, 8,192 tokens: product, choice", product / 790e6, (scored / COPY, 0, product / FEW_TILES + LAUNCH + LATENCY),
             launch(NEAR + WAIT, 8192 * 4 * 256, 0, ALONG_ROUTE["route_choose"], 8192 / SMS, ISSUED, 1))
    return rows


def tables(everything):
    with tempfile.TemporaryDirectory() as folder:
        cubin, found = pathlib.Path(folder) / "cubin", {}
        sources = sorted((ROOT / "target/cuda/kernels").glob("*.ptx"))
        if not sources:
            sys.exit("no PTX in target/cuda/kernels: cargo test --release --locked --test cuda_kernels")
        for source in sources:
            sh(TOOLS / "ptxas", "-arch=sm_90a", "-o", cubin, source)
            found.update(kernels_of(sh(disassembler(), "-c", cubin)))
    version = re.search(r"V([\d.]+)", sh(TOOLS / "ptxas", "--version")).group(1)
    lines = [f"Counted by `benches/kernel_counts.py --write` in the code of ptxas {version} for sm_90a, disassembled by nvdisasm {NVDISASM}: instructions per warp",
             "and iteration of a loop, inner loops separately. Both sides of a branch count, so code for odd widths is included (`STS`, `LDG`). `FFMA` is",
             "with `FADD` and `FMUL`; `waves` are accesses of 128 bytes of shared memory, without conflicts; `least` is `HMMA` without pairs of a bf16 and its rounding error.",
             "", "| kernel | loop | " + " | ".join(KINDS) + " | all | waves | least |",
             "|---|---|" + "---:|" * (len(KINDS) + 3)]
    for name, loops in sorted(found.items()):
        for loop in loops if everything else chosen(loops):
            what = "outside of loops" if loop is loops[0] else f"depth {loop.depth}, {loop.begin:#x}"
            least = ""
            if name in UNITS and loop is main_loop(name, loops)[0]:
                what, least = f"{UNITS[name][0]}", str(UNITS[name][1])
            counts = " | ".join(str(loop.count.kinds[kind] or "") for kind in KINDS)
            lines.append(f"| `{name}` | {what} | {counts} | {loop.count.all} | {loop.count.wavefronts or ''} | {least} |")
    lines += ["", f"**Predictions, not measurements.** {SMS} multiprocessors at {CLOCK / 1000} GHz, {COPY / 1e6} TB/s ({ALONE / 1e3:.0f} GB/s for a single one), {HMMA} clocks of",
              "a quarter for an `HMMA`, 128 bytes of shared memory and four instructions per clock; the largest of these and a tenth, 1.5 us per launch and",
              "1.5 us until the first bytes arrive. Microseconds; floors by 4.8 TB/s or 790 TFLOP/s.", "",
              "| work, one layer | bytes | tensor cores | shared memory | issue | predicted | floor | ratio |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    short = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.1f}"
    for what, *times, time, floor in model(found):
        ratio = f"{time / floor:.1f}" if floor else ""
        lines.append(f"| {what} | " + " | ".join(short(t) if t else "" for t in times) + f" | {short(time)} | {short(floor) if floor else ''} | {ratio} |")
    return "\n".join(lines) + "\n"


def main():
    text = tables("--all" in sys.argv)
    if "--write" not in sys.argv:
        print(text)
        return
    page = PAGE.read_text()
    for mark in MARKS:
        if page.count(mark) != 1:
            sys.exit(f"{PAGE}: {page.count(mark)} lines like {mark}")
    before, rest = page.split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + "\n" + text + "\n" + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
