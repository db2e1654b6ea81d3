"""Claims about speed: training and tokens a second. All as ratios between runs of one experiment."""

from __future__ import annotations

from dataclasses import replace

from attnlab.presets.claim import Claim, Which
from attnlab.presets.grid import Grid, Preset, Size
from attnlab.presets.quoted_memory import GUIDE, SMALL_LATENT, K

STANDARD = Which("multi_head", implementation="eager")
STEP_HOW = "time of a forward and backward of a bare module, over the standard's in the same experiment"
FLASH_2 = 1.6
FLASH_HOW = (
    "the standard does not fit at this length, so the ratio to FlashAttention-2 is compared: time of a forward and "
    "backward of a bare module, multi-head's by the kernel chosen for it over this"
)
SAME_KERNEL_HOW = (
    "time of a forward and backward of a bare module, multi-head's by the kernel chosen for it over this"
)


def _faster(
    claim_id: str,
    says: str,
    factor: float,
    which: Which,
    against: Which,
    how: str,
    quoted: str = "",
) -> Claim:
    return Claim(
        claim_id, says, "latency_ms", factor, factor, which, against, how, GUIDE, device="H100", quoted=quoted
    )


def _beside_flash(claim_id: str, says: str, factor: float, which: Which) -> Claim:
    quoted = f"{factor} times the standard, of which FlashAttention-2 has {FLASH_2}"
    return _faster(claim_id, says, factor / FLASH_2, which, AUTO, FLASH_HOW, quoted)


AUTO = Which("multi_head", implementation="auto")
TRAINING = Preset(
    name="training-speed",
    title="Training speed on an H100",
    about="Relative training speed by mechanism. “Standard” is taken as the kernel that forms all scores.",
    grids=(
        Grid(
            "claims: a training step by kernel",
            ("multi_head",),
            Size(256, 8, (512,), repeats=5),
            Size(2048, 16, (4 * K,), repeats=20),
            phase="train",
            implementations=("eager", "sdpa_flash"),
            record=("timing",),
        ),
        Grid(
            "claims: a training step by mechanism",
            ("multi_head", "flash_attention_3", "linear", "grouped_query", "multi_head_latent"),
            Size(256, 8, (512,), 2, repeats=5, parameters={"multi_head_latent": SMALL_LATENT}),
            Size(2048, 16, (16 * K,), 4, repeats=20),
            phase="train",
            record=("timing",),
        ),
    ),
    claims=(
        _faster(
            "flash-2",
            f"FlashAttention-2: {FLASH_2} times",
            FLASH_2,
            Which("multi_head", implementation="sdpa_flash"),
            STANDARD,
            STEP_HOW,
        ),
        _beside_flash("flash-3", "FlashAttention-3: 2.0 times", 2.0, Which("flash_attention_3")),
        _beside_flash("linear", "Linear: 2.3 times (long sequences)", 2.3, Which("linear")),
        _faster("gqa", "Grouped-query: 1.25 times", 1.25, Which("grouped_query"), AUTO, SAME_KERNEL_HOW),
        _faster(
            "mla", "Multi-head latent: 1.25 times", 1.25, Which("multi_head_latent"), AUTO, SAME_KERNEL_HOW
        ),
    ),
    correction="Fewer key heads do not make the scores cheaper: a part of the projections is all there is to gain.",
)

# tokens a second: batch 1, 8, 32, context 4K, 16K; None ran out of memory
COLUMNS = ("batch 1", "batch 8", "batch 32", "4K tokens", "16K tokens")
TOKENS: dict[str, tuple[int, int, int, int, int]] = {
    "flash-2": (1900, 14000, 45000, 1800, 1100),
    "flash-3": (2800, 21000, 67000, 2600, 1600),
    "gqa": (1500, 11000, 36000, 1400, 1000),
    "linear": (2200, 15000, 48000, 2100, 1900),
}
STANDARD_TOKENS = (1200, 8500, 28000, 900, None)
ROWS = {
    "flash-2": ("FlashAttention-2", Which("multi_head", implementation="auto"), "A100"),
    "flash-3": ("FlashAttention-3", Which("flash_attention_3", implementation="auto"), "H100"),
    "gqa": ("Grouped-query", Which("grouped_query", implementation="auto"), "A100"),
    "linear": ("Linear", Which("linear", implementation="auto"), "A100"),
}


def _tokens_claim(row: str, column: int) -> Claim:
    """The ratio to the standard of the same column; where the standard has run out of memory, to the same row at 4K."""
    title, which, device = ROWS[row]
    standard, quoted = STANDARD_TOKENS[column], TOKENS[row][column]
    batch, length = (column, 0) if column < 3 else (0, column - 2)
    chosen = replace(which, batch=batch, length=length)
    how = "the table names no model, so the ratio to its standard is compared: forward pass, eager over this"
    baseline, against, where = standard, replace(STANDARD, batch=batch, length=length), ""
    if baseline is None:
        how = "the standard is said to run out of memory, so tokens a second at the length before are compared with"
        baseline, against = TOKENS[row][column - 1], replace(which, batch=batch, length=length - 1)
        where = f" at {COLUMNS[column - 1]}, as the standard ran out of memory"
    return Claim(
        id=f"{row}-{COLUMNS[column].replace(' ', '-')}",
        says=f"{title}, {COLUMNS[column]}: {quoted:,} tokens a second",
        quantity="latency_ms",
        low=quoted / baseline,
        high=quoted / baseline,
        which=chosen,
        against=against,
        how=how,
        source=GUIDE,
        device=device,
        quoted=f"{quoted:,} against {baseline:,}{where}",
    )


_MECHANISMS = ("multi_head", "grouped_query", "linear", "flash_attention_3")
TOKENS_PER_SECOND = Preset(
    name="tokens-per-second",
    title="Tokens a second on an A100",
    about="The table of throughput by batch and by context; FlashAttention-3 in it is on an H100.",
    grids=(
        Grid(
            "claims: tokens a second by batch and context",
            _MECHANISMS,
            Size(128, 4, (64, 256, 512), 1, batches=(1, 4, 8), repeats=3),
            Size(1024, 8, (512, 4 * K, 16 * K), 2, batches=(1, 8, 32), repeats=20),
            implementations=("eager", "auto"),
            record=("timing",),
        ),
    ),
    claims=(
        *(_tokens_claim(row, column) for row in ROWS for column in range(5)),
        Claim(
            "standard-16k",
            "Standard attention runs out of memory at 16K tokens",
            "runs_out",
            16 * K,
            16 * K,
            STANDARD,
            None,
            "the longest run of the standard, and how it ended",
            GUIDE,
            device="A100",
            note="It takes n² · heads · batch numbers: 16K tokens of 8 heads in 16 bits are 4 GiB",
        ),
    ),
)

SPEED_PRESETS = (TRAINING, TOKENS_PER_SECOND)
