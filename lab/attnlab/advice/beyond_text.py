"""Advice: images and video, several modalities, and research on the mechanism itself."""

from __future__ import annotations

from attnlab.advice.tree import Avoid, Choice, Leaf, Part, Question, Source, Trial

VIT = Source("An Image is Worth 16x16 Words (ViT)", "https://arxiv.org/abs/2010.11929")
DETR = Source("End-to-End Object Detection with Transformers (DETR)", "https://arxiv.org/abs/2005.12872")
SEGFORMER = Source("SegFormer", "https://arxiv.org/abs/2105.15203")
NAT = Source("Neighborhood Attention Transformer (2022, CVPR 2023)", "https://arxiv.org/abs/2204.07143")
DINAT = Source("Dilated Neighborhood Attention Transformer", "https://arxiv.org/abs/2209.15001")
TIMESFORMER = Source(
    "Is Space-Time Attention All You Need? (TimeSformer)", "https://arxiv.org/abs/2102.05095"
)
SWIN = Source("Swin Transformer", "https://arxiv.org/abs/2103.14030")
FLAMINGO = Source("Flamingo: a Visual Language Model", "https://arxiv.org/abs/2204.14198")
WHISPER = Source(
    "Robust Speech Recognition via Large-Scale Weak Supervision", "https://arxiv.org/abs/2212.04356"
)


def _vision(asks: str, *mechanisms: str | dict[str, dict[str, object]], lengths: tuple[int, ...]) -> Trial:
    """A trial without a causal mask over whole images: 196 is 14 x 14 patches, 1024 is 32 x 32."""
    return Trial(asks, mechanisms, causal=False, lengths=lengths, fixed=True)


LOCAL = Leaf(
    key="vision/local",
    parts=(Part("neighborhood", "each pixel sees its k × k nearest; at a border the window shifts"),),
    reason=(
        "What decides is near: edges, textures, denoising. Neighborhood attention sees exactly k × k keys everywhere, "
        "moves with the pixel (no seams, unlike windows cut in squares), and costs n k² instead of n²."
    ),
    sources=(NAT, DINAT),
    avoid=(
        Avoid("multi_head", "pays for n² pairs of which nearly all are far apart"),
        Avoid("sliding_window", "runs along the rows: two pixels one above the other are a whole row apart"),
    ),
    correction="The Neighborhood Attention Transformer is of 2022 (CVPR 2023), not of 2024.",
    trial=_vision(
        "What does a k × k neighbourhood cost against full attention over the same pixels?",
        "multi_head",
        {"neighborhood": {"kernel_size": 7, "dims": 2}},
        lengths=(196, 1024),
    ),
)

GLOBAL_LOCAL = Leaf(
    key="vision/global_local",
    parts=(
        Part(
            "sparse",
            "a local window and a few tokens that see everything",
            {"sparsity_pattern": "local_global"},
        ),
    ),
    reason=(
        "Detail is local, the scene is not: a window for the first and a few global tokens, which read everything and "
        "are read by everything, for the second. Two steps connect any two patches at a cost of n (w + g)."
    ),
    sources=(Source("Vision Longformer", "https://arxiv.org/abs/2103.15358"),),
    avoid=(
        Avoid("neighborhood", "alone it needs many layers before two corners meet"),
        Avoid("linear", "smooth maps: poor at singling out one patch"),
    ),
    trial=_vision(
        "How do time and map change when far pairs go through global tokens?",
        "multi_head",
        {"sparse": {"sparsity_pattern": "local_global", "local_window": 32, "global_tokens": 4}},
        lengths=(196, 1024),
    ),
)

HIERARCHICAL = Leaf(
    key="vision/hierarchical",
    parts=(Part("sliding_window", "a fixed window at every stage; the image is halved between stages"),),
    reason=(
        "Halving the image between stages doubles what a window of the same size sees, so a few stages cover the whole "
        "image at a cost linear in its pixels: the pyramid that detection and segmentation heads expect."
    ),
    sources=(SWIN, NAT),
    avoid=(
        Avoid("multi_head", "the first, finest stage has the most tokens and would cost the most"),
        Avoid("ring", "the tokens fit one device"),
    ),
    correction=(
        "A window along the flattened rows is not a window in the image. Swin cuts squares and shifts them; "
        "neighborhood attention is the form without seams."
    ),
    trial=_vision(
        "What does each stage of a pyramid (32 × 32, 16 × 16, 8 × 8) cost with a window and without?",
        "multi_head",
        {"sliding_window": {"window_size": 49}},
        {"neighborhood": {"kernel_size": 7, "dims": 2}},
        lengths=(64, 256, 1024),
    ),
)

CLASSIFICATION = Leaf(
    key="vision/classification",
    parts=(Part("multi_head", "a plain ViT: 196 patches are few"),),
    reason=(
        "A 224 × 224 image is 196 patches of 16 × 16: full attention over so few tokens is cheaper than any pattern, "
        "every patch sees every other, and pre-trained weights exist."
    ),
    sources=(VIT,),
    avoid=(
        Avoid("sparse", "at 196 tokens the bookkeeping costs more than the pairs"),
        Avoid("linear", "attention over 196 tokens is a small part of a ViT's work: little to save"),
    ),
    trial=_vision(
        "Does anything beat full attention at the length of a ViT?",
        "multi_head",
        "flash",
        {"neighborhood": {"kernel_size": 7, "dims": 2}},
        lengths=(196,),
    ),
)

DETECTION = Leaf(
    key="vision/detection",
    parts=(Part("cross", "object queries read the image's features"),),
    reason=(
        "A set of learnt queries, one an object, reads the whole image by cross-attention: n queries times m features, "
        "with no anchors and no suppression of duplicates."
    ),
    sources=(DETR,),
    avoid=(
        Avoid("neighborhood", "as the decoder: an object query has no place before it has looked"),
        Avoid("chunked_prefill", "is for causal models"),
    ),
    trial=_vision(
        "What do 100 queries cost that read an image, against attention inside it?",
        "multi_head",
        "cross",
        lengths=(100, 196),
    ),
)

SEGMENTATION = Leaf(
    key="vision/segmentation",
    parts=(
        Part("efficient", "keys and values from a strided convolution", {"variant": "spatial_reduction"}),
    ),
    reason=(
        "Every pixel needs an answer, so the queries stay fine; what they read may be coarse. Spatial reduction by R "
        "makes keys and values R² times fewer, with every query still seeing the whole image."
    ),
    sources=(SEGFORMER, Source("Pyramid Vision Transformer", "https://arxiv.org/abs/2102.12122")),
    avoid=(Avoid("multi_head", "n² at the finest stage, where most of the tokens are"),),
    correction=(
        "“Efficient attention, O(n²)” holds for one of three different mechanisms of that name: exact in chunks is "
        "O(n²), softmax on each side O(n d²), spatial reduction O(n² / R²)."
    ),
    trial=_vision(
        "What do keys of a coarser grid save?",
        "multi_head",
        {"efficient": {"variant": "spatial_reduction", "reduction": 2}},
        lengths=(256, 1024),
    ),
)

HIGH_RESOLUTION = Leaf(
    key="vision/high_resolution",
    parts=(Part("neighborhood", "linear in the pixels; dilation widens the view at no cost"),),
    reason=(
        "A 1024 × 1024 image is 4096 patches, or a million pixels: only a cost linear in them works. Alternate "
        "dilation 1 and a larger one, and two layers reach across the image."
    ),
    sources=(NAT, DINAT),
    avoid=(
        Avoid("multi_head", "4096 patches are 16.8 million pairs a head"),
        Avoid("efficient", "spatial reduction is still quadratic, only by R² less"),
    ),
    trial=_vision(
        "Does the cost of neighbourhoods grow with the pixels, and full attention's with their square?",
        "multi_head",
        {"neighborhood": {"kernel_size": 7, "dims": 2}},
        {"neighborhood": {"kernel_size": 7, "dims": 2, "dilation": 2}},
        lengths=(256, 1024, 2304),
    ),
)

VIDEO = Leaf(
    key="vision/video",
    parts=(Part("multi_head", "divided: once over the frames of a place, then over the places of a frame"),),
    reason=(
        "Attention over all places of all frames is (T n)² pairs. Divided space-time attends over time at each "
        "place and then over space in each frame: T n (T + n) pairs, and no worse in the paper."
    ),
    sources=(TIMESFORMER,),
    avoid=(
        Avoid("sliding_window", "over flattened frames: the same place in the next frame is n tokens away"),
        Avoid("flash", "over all of it: the memory fits, the (T n)² work does not"),
    ),
    trial=_vision(
        "What do 8 frames of 196 patches cost jointly (1568 tokens), and divided (8 tokens, then 196)?",
        "multi_head",
        "flash",
        lengths=(8, 196, 1568),
    ),
)

VISION = Question(
    "task",
    "What is the task?",
    (
        Choice("local", "local patterns (denoising, texture)", "what decides is near", LOCAL),
        Choice("global_local", "global and local", "detail is local, the scene is not", GLOBAL_LOCAL),
        Choice("hierarchical", "hierarchical features", "a pyramid of stages", HIERARCHICAL),
        Choice("classification", "image classification", "few tokens, one answer", CLASSIFICATION),
        Choice("detection", "object detection", "a set of queries reads the image", DETECTION),
        Choice("segmentation", "semantic segmentation", "fine queries, coarse keys", SEGMENTATION),
        Choice("high_resolution", "high-resolution images", "the pixels decide", HIGH_RESOLUTION),
        Choice("video", "video", "time and space are different axes", VIDEO),
    ),
)

MULTIMODAL = Leaf(
    key="multimodal",
    parts=(Part("cross", "text queries read keys and values of the image or the sound"),),
    reason=(
        "Two sequences of different length and nature: queries of one read keys and values of the other, which are "
        "computed once and reused at every decoding step."
    ),
    sources=(FLAMINGO, WHISPER),
    avoid=(
        Avoid("sliding_window", "distance between a word and a patch means nothing"),
        Avoid("grouped_query", "alone: it relates tokens of one sequence"),
    ),
    correction=(
        "It is not the only way: many newer models (LLaVA) put image tokens into the text and use plain "
        "self-attention, which is simpler and fills the cache with them."
    ),
    cache="cross",
    trial=Trial(
        "What does reading a context cost, against attending inside one sequence?",
        ("multi_head", "cross"),
        causal=False,
        lengths=(196, 576),
        fixed=True,
    ),
)

NOVEL = Leaf(
    key="research/novel",
    parts=(Part("differential", "two maps, one subtracted: what both attend to cancels"),),
    reason=(
        "Differential attention asks whether attention to irrelevant context is common to two maps and can be "
        "cancelled. It has its own signed map to look at, and a second version that keeps the baseline's kernels."
    ),
    avoid=(Avoid("switch_head", "changes the projections, not the map"),),
    correction=(
        "DeepSeek-V3 is no example of it: it uses latent attention and experts in the feed-forward, and no "
        "differential attention."
    ),
    cache="differential",
    trial=Trial(
        "What does the subtracted map take away, and what do two maps cost?", ("multi_head", "differential")
    ),
)

EFFICIENCY = Leaf(
    key="research/efficiency",
    parts=(Part("linear", "no n × n at all: features, and one running state"),),
    reason=(
        "The extreme of efficiency is no pairwise scores: O(n) time, a constant state, and the open question of what "
        "recall that costs. Its implied map can be compared with the softmax's, entry by entry."
    ),
    avoid=(Avoid("efficient", "two of its three variants are still quadratic"),),
    correction=(
        "“20 % of multi-head's memory” is an illustration: the state is constant, so the ratio is anything you like by "
        "choice of the length. See the bytes for your shape."
    ),
    cache="linear",
    trial=Trial(
        "From which length is the linear form faster, and how far is its map from the softmax's?",
        ("multi_head", "linear", {"linear": {"feature_map": "softmax_kernel"}}),
        lengths=(256, 1024, 4096),
    ),
)

EXPERTS = Leaf(
    key="research/moe",
    parts=(Part("switch_head", "few maps; values and outputs through chosen experts"),),
    reason=(
        "Mixture of experts inside attention: fewer n × n maps at the same quality, because the projections, not the "
        "maps, hold the experts. The routing of every token can be seen beside the map."
    ),
    avoid=(
        Avoid("multi_head", "with experts in the feed-forward only: leaves the maps as many as they were"),
    ),
    correction="SwitchHead is of IDSIA, Stanford, KAUST and Harvard (Csordás et al., NeurIPS 2024), not of Google.",
    cache="switch_head",
    trial=Trial(
        "What do two experts out of four cost for each token, against plain heads?",
        ("multi_head", {"switch_head": {"num_experts": 4, "top_k": 2}}),
    ),
)

RESEARCH = Question(
    "aim",
    "What is to be found out?",
    (
        Choice("novel", "a new kind of map", "noise common to two maps", NOVEL),
        Choice("efficiency", "extreme efficiency", "no pairwise scores", EFFICIENCY),
        Choice("moe", "experts inside attention", "routing instead of heads", EXPERTS),
    ),
)
