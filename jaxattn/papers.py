"""The catalogue: papers, what in this library carries them, and what checks it.

A paper that has no line here is not covered. A line says what is there now: where only a part of a paper is, the note
says which. `python -m jaxattn.papers` prints docs/papers.md, and with `--summary` the table of the README.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, NamedTuple


class Paper(NamedTuple):
    """One paper.

    Attributes:
        row: Its number in the list of papers that the library sets out to cover; None for what they build on.
        name: Its short name, by which experiments cite it.
        title: Its title, or what the field calls it and who described it.
        year: When it appeared; None where that was not confirmed.
        arxiv: Its arXiv id; None where it was not confirmed.
        parts: Dotted names of what carries it.
        checks: Experiments, by name, and test files that hold it to what it says.
        note: What the parts are in the paper's terms, in one line.
    """

    row: int | None
    name: str
    title: str
    year: int | None
    arxiv: str | None
    parts: tuple[str, ...]
    checks: tuple[str, ...]
    note: str

    def cite(self) -> str:
        """Title, year and arXiv id, as far as they are known."""
        known = [str(self.year)] if self.year else []
        known += [f"[{self.arxiv}](https://arxiv.org/abs/{self.arxiv})"] if self.arxiv else []
        return f"{self.title} ({', '.join(known)})" if known else self.title


REDUCTIONS = "tests/core/test_reductions.py"
DOCS = "tests/test_docs.py"
MODULE = "tests/nn/test_multi_head_attention.py"
RECURRENT = "tests/nn/test_recurrent.py"
MEMORIES = "tests/core/test_linear.py"
HYBRID = "tests/nn/test_hybrid.py"

PAPERS: tuple[Paper, ...] = (
    Paper(
        3,
        "attention_survey",
        "An Attentive Survey of Attention Models",
        2021,
        "1904.02874",
        ("jaxattn.Dot", "jaxattn.Bilinear", "jaxattn.Additive", "jaxattn.Neural", "jaxattn.Location"),
        (REDUCTIONS,),
        "its score functions; general with W = I is dot",
    ),
    Paper(
        8,
        "head_importance",
        "Are Sixteen Heads Really Better than One?",
        2019,
        None,
        ("jaxattn.Map",),
        ("tests/test_docs.py",),
        "the slope of a loss in a gate per head, as an example in docs/attend.md; not its pruning",
    ),
    Paper(
        16,
        "attention_sinks",
        "When Attention Sink Emerges in Language Models: An Empirical View",
        2025,
        "2410.10781",
        ("jaxattn.Sigmoid", "jaxattn.Elu1", "jaxattn.Linear", "jaxattn.analysis.head_statistics"),
        ("tests/core/test_normalize.py", "tests/analysis/test_heads.py"),
        "normalisers that form no sink, and the mass on the first key",
    ),
    Paper(
        17,
        "fastmax",
        "FAST: Factorizable Attention for Speeding up Transformers",
        2024,
        "2402.07901",
        ("jaxattn.TaylorFeatures", "jaxattn.StandardizedFeatures"),
        ("tests/core/test_feature.py", "feature_maps"),
        "Taylor polynomials of standardised queries and keys",
    ),
    Paper(
        18,
        "multi_token_attention",
        "Multi-Token Attention",
        2025,
        None,
        ("jaxattn.Convolution", "jaxattn.MixHeads"),
        (REDUCTIONS, DOCS, "tests/nn/test_learned.py"),
        "convolution over queries and keys, and over heads, before or after the softmax",
    ),
    Paper(
        19,
        "show_attend_tell",
        "Show, Attend and Tell",
        2015,
        None,
        ("jaxattn.Additive", "jaxattn.OneHotSample", "jaxattn.score_function", "jaxattn.Received"),
        ("tests/core/test_noise.py", DOCS),
        "soft and hard reading; `Received` is what its doubly stochastic penalty penalises",
    ),
    Paper(
        26,
        "titans",
        "Titans: Learning to Memorize at Test Time",
        None,
        "2501.00663",
        (
            "jaxattn.memory_scan",
            "jaxattn.memory_read",
            "jaxattn.nn.NeuralMemory",
            "jaxattn.nn.MemoryAsContext",
            "jaxattn.nn.memory_as_gate",
            "jaxattn.nn.memory_as_layer",
            "jaxattn.models.Titans",
        ),
        (
            "tests/core/test_memory_scan.py",
            RECURRENT,
            HYBRID,
            "needle",
        ),
        "the memory, with momentum and forgetting, as context, gate or layer behind persistent tokens",
    ),
    Paper(
        27,
        "bert_attention_stats",
        "What Does BERT Look At?",
        2019,
        "1906.04341",
        ("jaxattn.Entropy", "jaxattn.Mass", "jaxattn.LagProfile"),
        ("tests/core/test_measures.py",),
        "entropies and shares of attention by offset and by token class; not its clusters and probes",
    ),
    Paper(
        31,
        "bayes_attention",
        "Attention: Marginal Probability is All You Need?",
        2023,
        "2304.04556",
        ("jaxattn.KeyBias", "jaxattn.Bias", "jaxattn.NegativeDistance"),
        (REDUCTIONS,),
        "priors over keys are biases; a mixture of Gaussians is a distance score",
    ),
    Paper(
        34,
        "variational_attention",
        "Latent Alignment and Variational Attention",
        2018,
        "1807.03756",
        ("jaxattn.OneHotSample", "jaxattn.Gumbel", "jaxattn.score_function"),
        ("tests/core/test_noise.py",),
        "the estimators (score function, relaxed draws); not its inference network",
    ),
    Paper(
        36,
        "dsf",
        "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural "
        "Networks",
        2024,
        "2405.15731",
        tuple(
            f"jaxattn.{name}"
            for name in (
                "StateEquation",
                "attention_equation",
                "softmax_equation",
                "normalized_equation",
                "state_space_equation",
                "gated_rnn_equation",
            )
        ),
        ("tests/core/test_state_equation.py", DOCS),
        "softmax, linear attention, the selective scan and a gated RNN as one state equation, and where they coincide",
    ),
    Paper(
        39,
        "pasta",
        "Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs",
        2024,
        None,
        ("jaxattn.Reallocate", "jaxattn.KeyBias"),
        ("tests/core/test_reductions.py", "tests/test_docs.py"),
        "its edit of the weights; not its choice of heads",
    ),
    Paper(
        40,
        "retrieval_depth",
        "Mechanism and Emergence of Stacked Attention Heads in Multi-Layer Transformers",
        2025,
        "2411.12118",
        (
            "jaxattn.icl.RetrievalChain",
            "jaxattn.icl.horizon",
        ),
        ("tests/icl/test_sequences.py",),
        "the task, and how many hops so many layers can follow",
    ),
    Paper(
        45,
        "pattern_injection",
        "Human Guided Exploitation of Interpretable Attention Patterns",
        2022,
        "2112.05364",
        ("jaxattn.Explicit", "jaxattn.PerHead"),
        ("tests/core/test_masks.py",),
        "a predicate on token pairs as the mask of chosen heads",
    ),
    Paper(
        47,
        "hymba",
        "Hymba: A Hybrid-head Architecture for Small Language Models",
        None,
        "2411.13676",
        (
            "jaxattn.nn.Parallel",
            "jaxattn.models.Hymba",
            "jaxattn.models.hymba",
            "jaxattn.models.DecoderConfig",
        ),
        (HYBRID, "tests/models/test_hybrid_models.py"),
        "attention and state-space heads side by side, meta tokens, keys shared across layers, windows",
    ),
    Paper(
        48,
        "softmax_icl",
        "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head "
        "Softmax Attention",
        2025,
        "2503.12734",
        ("jaxattn.SoftmaxHeads", "jaxattn.icl.DebiasedDescent", "jaxattn.icl.layer_theory.softmax_icl_loss"),
        ("softmax_regression", "tests/icl/test_theory.py", "tests/icl/test_constructed.py"),
        "several heads as one debiased gradient step",
    ),
    Paper(
        51,
        "learned_task_vector",
        "Learning Task Representations from In-Context Learning",
        2025,
        "2502.05390",
        (
            "jaxattn.trace.Add",
            "jaxattn.models.Decoder",
        ),
        (
            "task_vectors",
            "tests/models/test_edits.py",
        ),
        "a learned weighting of head outputs, added to the residual stream",
    ),
    Paper(
        52,
        "lln",
        "Linear Log-Normal Attention with Unbiased Concentration",
        2024,
        "2311.13541",
        ("jaxattn.LogNormalFeatures", "jaxattn.moment_match"),
        ("tests/core/test_feature.py", "feature_maps"),
        "exponential features whose weights are as concentrated as those of softmax",
    ),
    Paper(
        54,
        "neural_attention",
        "Neural Attention: A Novel Mechanism for Enhanced Expressive Power",
        2025,
        "2502.17206",
        ("jaxattn.Neural", "jaxattn.nn.NeuralScore"),
        (REDUCTIONS, "tests/nn/test_learned.py"),
        "the score is a network of query and key",
    ),
    Paper(
        85,
        "acmil",
        "Attention-Challenging Multiple Instance Learning",
        2024,
        "2311.07125",
        ("jaxattn.DropTopK",),
        ("tests/core/test_noise.py", REDUCTIONS),
        "its stochastic masking of the largest weights",
    ),
    Paper(
        95,
        "low_rank_bottleneck",
        "Low-Rank Bottleneck in Multi-head Attention Models",
        2020,
        None,
        ("jaxattn.nn.MultiHeadAttention",),
        (MODULE,),
        "`head_dim` is free of width / heads",
    ),
    Paper(
        96,
        "based",
        "Simple linear attention language models balance the recall-throughput tradeoff",
        None,
        "2402.18668",
        ("jaxattn.TaylorFeatures", "jaxattn.Window", "jaxattn.nn.GatedConvolution", "jaxattn.models.based"),
        ("tests/core/test_feature.py", "tests/models/test_hybrid_models.py", "recall"),
        "Taylor features of degree 2, small windows, gated convolutions, and the recall that its state dials",
    ),
    Paper(
        99,
        "luong",
        "Effective Approaches to Attention-based Neural Machine Translation",
        2015,
        None,
        ("jaxattn.Bilinear", "jaxattn.Location", "jaxattn.GaussianWindow", "jaxattn.LogGaussian"),
        (REDUCTIONS,),
        "its scores, and local attention around a predicted centre",
    ),
    Paper(
        103,
        "bertviz",
        "A Multiscale Visualization of Attention in the Transformer Model",
        2019,
        None,
        ("jaxattn.viz.show_heads",),
        ("tests/viz/test_viz.py",),
        "the weights of all heads in one picture",
    ),
    Paper(
        104,
        "folded_context",
        "Folded context condensation in Path Integral formalism for infinite context transformers",
        None,
        "2405.04620",
        ("jaxattn.models.FoldedDecoder",),
        ("tests/models/test_folded.py",),
        "a reading of it: top states of a segment enter the next at the bottom; not its phase term",
    ),
    Paper(
        106,
        "pretraining_tasks",
        "How Many Pretraining Tasks Are Needed for In-Context Learning of Linear Regression?",
        2024,
        "2310.08391",
        (
            "jaxattn.icl.layer_theory.task_complexity_bound",
            "jaxattn.icl.layer_theory.linear_icl_risk",
            "jaxattn.icl.Preconditioned",
        ),
        (
            "pretraining_tasks",
            "tests/icl/test_theory.py",
        ),
        "the exact risk of one layer, the mean path of its training, and the bound",
    ),
    Paper(
        118,
        "hedgehog",
        "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        2024,
        "2402.04347",
        (
            "jaxattn.HedgehogFeatures",
            "jaxattn.distillation_loss",
            "jaxattn.models.linearize",
            "jaxattn.models.matching_loss",
        ),
        ("tests/core/test_feature.py", "tests/models/test_convert.py", "feature_maps", "conversion"),
        "learned features, their distillation from softmax, and the conversion of a trained decoder",
    ),
    Paper(
        119,
        "boolean_icl",
        "Understanding In-Context Learning in Transformers and LLMs by Learning to Learn Discrete Functions",
        2024,
        None,
        (
            "jaxattn.icl.Conjunction",
            "jaxattn.icl.Teaching",
            "jaxattn.icl.BayesFinite",
            "jaxattn.icl.GF2Parity",
        ),
        (
            "boolean_functions",
            "tests/icl/test_boolean.py",
            "tests/icl/test_bayes.py",
        ),
        "its classes of functions, teaching sequences, and the optimal learners",
    ),
    Paper(
        121,
        "performer",
        "Rethinking Attention with Performers",
        2021,
        "2009.14794",
        ("jaxattn.RandomFeatures", "jaxattn.orthogonal_gaussian"),
        ("tests/core/test_feature.py", "feature_maps"),
        "random features, positive, hyperbolic and trigonometric, with orthogonal directions",
    ),
    Paper(
        122,
        "mimetic_ssm",
        "Mimetic Initialization Helps State Space Models Learn to Recall",
        2024,
        "2410.11135",
        ("jaxattn.nn.mimetic_initialization",),
        (RECURRENT, "copying"),
        "of Mamba-2: hardly any decay, steps of 1, equal queries and keys",
    ),
    Paper(
        123,
        "miras",
        "It's All Connected: test-time memorization, attentional bias, retention, online optimization",
        None,
        "2504.13173",
        (
            "jaxattn.memory_scan",
            "jaxattn.Huber",
            "jaxattn.LpError",
            "jaxattn.LqMirror",
            "jaxattn.SoftmaxLink",
            "jaxattn.nn.NeuralMemory",
        ),
        (
            "tests/core/test_memory_scan.py",
            RECURRENT,
        ),
        "Moneta, Yaad and Memora as losses and links; gates per head and token",
    ),
    Paper(
        125,
        "rnope_swa",
        "Rope to Nope and Back Again: A New Hybrid Attention Strategy",
        None,
        "2501.18795",
        ("jaxattn.models.Layer", "jaxattn.Window", "jaxattn.Mass"),
        ("tests/models/test_decoder.py", "tests/core/test_measures.py"),
        "a list of layers, some rotary in a window and some without positions",
    ),
    Paper(
        126,
        "quest",
        "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
        2024,
        None,
        ("jaxattn.BlockIndex.from_scores", "jaxattn.Blocks"),
        (DOCS,),
        "its bound on the scores of a block, as an example in docs/blocks.md",
    ),
    Paper(
        139,
        "latte",
        "Latent Attention for Linear Time Transformers (Latte)",
        2024,
        "2402.17512",
        (
            "jaxattn.running_softmax",
            "jaxattn.nn.Latte",
            "jaxattn.models.Latte",
        ),
        (
            RECURRENT,
            DOCS,
            "recall",
        ),
        "causal, as a memory with per-channel decay, over all tokens, and with a window as one more latent",
    ),
    Paper(
        147,
        "abrupt_icl",
        "The mechanistic basis of data dependence and abrupt learning in an in-context classification task",
        2024,
        "2312.03002",
        ("jaxattn.icl.ItemLabels",),
        ("tests/icl/test_bursts.py",),
        "the task, and who knows the context or the classes",
    ),
    Paper(
        152,
        "moba",
        "MoBA: Mixture of Block Attention for Long-Context LLMs",
        2025,
        "2502.13189",
        ("jaxattn.BlockIndex.from_scores", "jaxattn.Blocks", "jaxattn.block_means"),
        ("tests/core/test_blocks.py", DOCS),
        "each query reads its own block and the past blocks whose mean key it matches best",
    ),
    Paper(
        161,
        "bird_eye",
        "Bird-Eye Transformers for Text Generation Models",
        None,
        "2210.03985",
        ("jaxattn.KeyBias",),
        (REDUCTIONS,),
        "an importance per key, added to the log-weights",
    ),
    Paper(
        162,
        "induction_heads",
        "In-context Learning and Induction Heads",
        2022,
        "2209.11895",
        (
            "jaxattn.icl.induction_head",
            "jaxattn.icl.MarkovChain",
            "jaxattn.icl.RepeatedBlock",
        ),
        (
            "tests/icl/test_constructed.py",
            "tests/icl/test_sequences.py",
        ),
        "the circuit as weights written by hand, and its tasks",
    ),
    Paper(
        163,
        "lamina",
        "Efficient and Economic LLM Inference with Attention Offloading",
        2024,
        "2405.01814",
        ("jaxattn.Partial", "jaxattn.merge"),
        ("tests/core/test_partial.py",),
        "the merge of partial results; not the offloading",
    ),
    Paper(
        165,
        "lookback_lens",
        "Lookback Lens: Detecting and Mitigating Contextual Hallucinations Using Only Attention Maps",
        2024,
        "2407.07071",
        ("jaxattn.Lookback",),
        ("tests/core/test_measures.py",),
        "the lookback ratio; not its classifier",
    ),
    Paper(
        166,
        "attentive_reader",
        "Teaching Machines to Read and Comprehend",
        2015,
        None,
        ("jaxattn.Additive",),
        (REDUCTIONS,),
        "the attentive reader's score",
    ),
    Paper(
        176,
        "intra_attention_summariser",
        "A Deep Reinforced Model for Abstractive Summarization",
        2018,
        None,
        ("jaxattn.Temporal",),
        (REDUCTIONS,),
        "keys that earlier queries attended to are discounted",
    ),
    Paper(
        179,
        "attention_sum_reader",
        "Embracing data abundance: BookTest Dataset",
        2016,
        None,
        ("jaxattn.Mass",),
        ("tests/core/test_measures.py", "tests/core/test_reductions.py"),
        "the weights summed by token; not its recurrent encoder",
    ),
    Paper(
        180,
        "aem",
        "AEM: Attention Entropy Maximization for Multiple Instance Learning",
        2024,
        None,
        ("jaxattn.Entropy",),
        ("tests/core/test_measures.py", "tests/test_docs.py"),
        "the entropy that its penalty is made of, with gradients",
    ),
    Paper(
        185,
        "gat",
        "Leveraging Graph Structures to Detect Hallucinations in LLMs",
        2024,
        None,
        ("jaxattn.PairSum", "jaxattn.Graph"),
        (REDUCTIONS, DOCS),
        "its graph attention layer; not its detection of hallucinations",
    ),
    Paper(
        None,
        "softmax",
        "Scaled dot-product attention, sinusoidal positions (Vaswani et al.)",
        2017,
        None,
        ("jaxattn.attend", "jaxattn.sinusoidal"),
        ("tests/core/test_attend.py", "tests/core/test_agreement.py", "tests/core/test_position.py"),
        "the defaults of `attend`",
    ),
    Paper(
        None,
        "bahdanau",
        "Additive attention (Bahdanau et al.)",
        2015,
        None,
        ("jaxattn.Additive",),
        (REDUCTIONS,),
        "vᵀ tanh(A q + B k)",
    ),
    Paper(
        None,
        "garg_icl",
        "What Can Transformers Learn In-Context? A Case Study of Simple Function Classes",
        2022,
        "2208.01066",
        (
            "jaxattn.icl.FunctionTask",
            "jaxattn.icl.compare",
            "jaxattn.icl.Curriculum",
        ),
        (
            "function_classes",
            "tests/icl/test_regression.py",
        ),
        "tasks, their shifts, and the estimators a model is held against",
    ),
    Paper(
        None,
        "icl_gradient_descent",
        "Transformers learn in-context by gradient descent (von Oswald et al.)",
        2023,
        "2212.07677",
        (
            "jaxattn.icl.GradientDescent",
            "jaxattn.icl.Preconditioned",
        ),
        (
            "gradient_descent",
            "tests/icl/test_regression.py",
        ),
        "layers as steps, and GD++",
    ),
    Paper(
        None,
        "preconditioned_icl",
        "Transformers learn to implement preconditioned gradient descent (Ahn et al.)",
        2023,
        "2306.00297",
        (
            "jaxattn.icl.Preconditioned",
            "jaxattn.icl.layer_theory.lsa_optimum",
        ),
        (
            "gradient_descent",
            "tests/icl/test_theory.py",
        ),
        "the best weights in closed form",
    ),
    Paper(
        None,
        "linear_attention_icl",
        "Trained transformers learn linear models in-context (Zhang, Frei and Bartlett)",
        2023,
        "2306.09927",
        (
            "jaxattn.icl.layer_theory.lsa_optimum",
            "jaxattn.icl.layer_theory.lsa_minimum",
        ),
        (
            "gradient_descent",
            "tests/icl/test_theory.py",
        ),
        "what a structured start is trained to",
    ),
    Paper(
        None,
        "zoology",
        "Zoology: Measuring and Improving Recall in Efficient Language Models",
        None,
        "2312.04927",
        ("jaxattn.icl.AssociativeRecall",),
        ("recall",),
        "multi-query associative recall, the task",
    ),
    Paper(
        None,
        "linear_transformer",
        "Transformers are RNNs (Katharopoulos et al.)",
        2020,
        "2006.16236",
        ("jaxattn.Elu1Features", "jaxattn.linear_attention", "jaxattn.nn.LinearAttention"),
        ("tests/core/test_feature.py",),
        "the elu + 1 map",
    ),
    Paper(
        None,
        "retnet",
        "Retentive network (Sun et al.)",
        2023,
        None,
        (
            "jaxattn.retention",
            "jaxattn.nn.RetNet",
        ),
        (
            RECURRENT,
            MEMORIES,
            "extrapolation",
        ),
        "constant decay per head, without the rescaling of its scores",
    ),
    Paper(
        None,
        "gla",
        "Gated linear attention (Yang et al.)",
        2023,
        "2312.06635",
        ("jaxattn.nn.GLA",),
        (
            RECURRENT,
            MEMORIES,
            "extrapolation",
        ),
        "decay per channel, in chunks that never overflow",
    ),
    Paper(
        None,
        "hgrn2",
        "HGRN-2 (Qin et al.)",
        2024,
        "2404.07904",
        (
            "jaxattn.lower_bounded_decay",
            "jaxattn.nn.HGRN2",
        ),
        (RECURRENT,),
        "forget gates whose complement is the key; the lower bound is given, not learned",
    ),
    Paper(
        None,
        "mamba",
        "Mamba (Gu and Dao)",
        None,
        "2312.00752",
        ("jaxattn.softplus_decay", "jaxattn.nn.S6", "jaxattn.models.S6"),
        (RECURRENT,),
        "the selective scan, a memory of V = 1 per channel",
    ),
    Paper(
        None,
        "mamba2",
        "Mamba-2, state-space duality (Dao and Gu)",
        2024,
        "2405.21060",
        (
            "jaxattn.nn.Mamba2",
            "jaxattn.mixing_matrix",
        ),
        (
            RECURRENT,
            MEMORIES,
        ),
        "scalar decay, shared keys and queries",
    ),
    Paper(
        None,
        "rwkv6",
        "RWKV-6 (Finch)",
        2024,
        "2404.05892",
        ("jaxattn.linear_attention",),
        (MEMORIES,),
        "the recurrence: reads before the write, with a bonus for the token itself; no module",
    ),
    Paper(
        None,
        "deltanet",
        "DeltaNet over sequence length (Yang et al.)",
        2024,
        "2406.06484",
        (
            "jaxattn.Delta",
            "jaxattn.nn.DeltaNet",
        ),
        (
            RECURRENT,
            MEMORIES,
            "recall",
        ),
        "the delta rule, solved within chunks",
    ),
    Paper(
        None,
        "gated_deltanet",
        "Gated DeltaNet (Yang et al.)",
        2024,
        "2412.06464",
        (
            "jaxattn.Delta",
            "jaxattn.nn.DeltaNet",
        ),
        (
            RECURRENT,
            MEMORIES,
            "extrapolation",
        ),
        "the delta rule after a decay per head",
    ),
    Paper(
        None,
        "kimi_linear",
        "Kimi Linear: Kimi delta attention",
        2025,
        "2510.26692",
        (
            "jaxattn.bounded_decay",
            "jaxattn.nn.DeltaNet",
        ),
        (
            RECURRENT,
            MEMORIES,
        ),
        "the delta rule after a decay per channel",
    ),
    Paper(
        None,
        "rwkv7",
        "RWKV-7 (Peng et al.)",
        2025,
        "2503.14456",
        (
            "jaxattn.Erase",
            "jaxattn.nn.RWKV7",
        ),
        (
            RECURRENT,
            MEMORIES,
        ),
        "the general correction of rank one; values are not mixed with those of the first layer",
    ),
    Paper(
        None,
        "ttt",
        "Learning to (learn at test time) (Sun et al.)",
        2024,
        "2407.04620",
        (
            "jaxattn.MLPMemory",
            "jaxattn.nn.TTT",
        ),
        (
            "tests/core/test_memory_scan.py",
            RECURRENT,
        ),
        "TTT-Linear and TTT-MLP, inside the layer of the paper's code",
    ),
    Paper(
        None,
        "graph_attention",
        "Graph attention (Veličković et al.)",
        2018,
        None,
        ("jaxattn.PairSum", "jaxattn.Graph"),
        (REDUCTIONS, DOCS),
        "LeakyReLU(a·q + b·k) over the edges of a graph",
    ),
    Paper(
        None,
        "alibi",
        "ALiBi (Press et al.)",
        2022,
        None,
        ("jaxattn.Alibi",),
        (REDUCTIONS, "tests/core/test_agreement.py", "extrapolation"),
        "a bias linear in distance",
    ),
    Paper(
        None,
        "t5",
        "T5: relative position buckets, prefix masks (Raffel et al.)",
        2020,
        None,
        ("jaxattn.RelativeBias", "jaxattn.Prefix"),
        (REDUCTIONS, "tests/core/test_masks.py"),
        "a learned bias per bucket of distances",
    ),
    Paper(
        None,
        "rotary",
        "Rotary position embedding (Su et al.)",
        2021,
        None,
        ("jaxattn.rotary",),
        ("tests/core/test_position.py",),
        "scores that depend on distance alone",
    ),
    Paper(
        None,
        "rotary_2d",
        "Axial rotary embedding for images (Heo et al.)",
        2024,
        None,
        ("jaxattn.rotary_2d",),
        ("tests/core/test_position.py",),
        "half of the channels by row, half by column",
    ),
    Paper(
        None,
        "position_interpolation",
        "Position interpolation (Chen et al.)",
        2023,
        None,
        ("jaxattn.Interpolate",),
        ("tests/core/test_position.py",),
        "position / factor",
    ),
    Paper(
        None,
        "yarn",
        "YaRN, and NTK-aware scaling (Peng et al.)",
        2023,
        None,
        ("jaxattn.Yarn", "jaxattn.NTK"),
        ("tests/core/test_position.py",),
        "fast rotary pairs stay, slow ones are interpolated",
    ),
    Paper(
        None,
        "llama3",
        "The Llama 3 herd of models (Dubey et al.)",
        2024,
        "2407.21783",
        ("jaxattn.Llama3",),
        ("tests/core/test_position.py",),
        "the rotary frequencies of Llama 3.1, and no more of the paper",
    ),
    Paper(
        None,
        "longrope",
        "LongRoPE (Ding et al.)",
        2024,
        "2402.13753",
        ("jaxattn.LongRope",),
        ("tests/core/test_position.py",),
        "a divisor per rotary pair and the scale of attention; divisors are given, not searched for",
    ),
    Paper(
        None,
        "learned_positions",
        "Learned absolute positions (Gehring et al.)",
        2017,
        None,
        ("jaxattn.LearnedPositions",),
        ("tests/core/test_position.py",),
        "a vector per position, added to the input",
    ),
    Paper(
        None,
        "streaming_llm",
        "StreamingLLM (Xiao et al.)",
        2024,
        None,
        ("jaxattn.Sinks", "jaxattn.Window"),
        ("tests/core/test_masks.py", "tests/nn/test_decode.py"),
        "a window and the first tokens, as a mask; not its evicting cache",
    ),
    Paper(
        None,
        "sparse_transformer",
        "Strided sparse transformer (Child et al.)",
        2019,
        None,
        ("jaxattn.Dilated",),
        ("tests/core/test_masks.py",),
        "every step-th key",
    ),
    Paper(
        None,
        "specinfer",
        "SpecInfer (Miao et al.)",
        2024,
        None,
        ("jaxattn.Ancestors",),
        ("tests/core/test_masks.py", DOCS),
        "a tree of drafts verified in one call",
    ),
    Paper(
        None,
        "sparsemax",
        "Sparsemax (Martins and Astudillo)",
        2016,
        None,
        ("jaxattn.Sparsemax",),
        (REDUCTIONS,),
        "the projection onto the simplex",
    ),
    Paper(
        None,
        "entmax",
        "1.5-entmax (Peters et al.)",
        2019,
        None,
        ("jaxattn.Entmax15",),
        (REDUCTIONS,),
        "between softmax and sparsemax",
    ),
    Paper(
        None,
        "gumbel_softmax",
        "Gumbel-softmax (Jang et al.; Maddison et al.)",
        2017,
        None,
        ("jaxattn.Gumbel",),
        ("tests/core/test_noise.py",),
        "relaxed draws",
    ),
    Paper(
        None,
        "reinforce",
        "REINFORCE (Williams)",
        1992,
        None,
        ("jaxattn.OneHotSample", "jaxattn.score_function"),
        ("tests/core/test_noise.py", DOCS),
        "the gradient of a hard choice",
    ),
    Paper(
        None,
        "talking_heads",
        "Talking heads (Shazeer et al.)",
        2020,
        None,
        ("jaxattn.MixHeads", "jaxattn.nn.HeadMixing"),
        (REDUCTIONS, DOCS),
        "heads read each other's scores and weights",
    ),
    Paper(
        None,
        "swiglu",
        "SwiGLU (Shazeer)",
        2020,
        None,
        ("jaxattn.nn.FeedForward",),
        ("tests/nn/test_feed_forward.py",),
        "the gated feed-forward block",
    ),
    Paper(
        None,
        "softcap",
        "Soft cap of Gemma 2",
        2024,
        None,
        ("jaxattn.SoftCap",),
        (REDUCTIONS,),
        "scores stay within ±cap",
    ),
    Paper(
        None,
        "sink_logit",
        "A learned logit beside the keys, as in gpt-oss",
        None,
        None,
        ("jaxattn.Softmax", "jaxattn.nn.NullSoftmax"),
        ("tests/core/test_normalize.py", "tests/core/test_partial.py", "tests/nn/test_learned.py"),
        "a place to attend to nothing",
    ),
    Paper(
        None,
        "qk_norm",
        "Query and key normalisation",
        None,
        None,
        ("jaxattn.nn.MultiHeadAttention",),
        (MODULE,),
        "RMS norm before rotation",
    ),
    Paper(
        None,
        "gqa",
        "Grouped-query and multi-query attention",
        None,
        None,
        ("jaxattn.attend", "jaxattn.nn.MultiHeadAttention"),
        ("tests/core/test_attend.py", MODULE),
        "key heads are shared by groups of query heads",
    ),
    Paper(
        None,
        "split_k",
        "Split-K decoding and shared prefixes",
        None,
        None,
        ("jaxattn.Partial", "jaxattn.merge"),
        ("tests/core/test_partial.py", DOCS),
        "attention over all keys is the merge of attention over parts of them",
    ),
    Paper(
        None,
        "nucleus",
        "Nucleus sampling (Holtzman et al.)",
        2020,
        None,
        ("jaxattn.models.sample",),
        ("tests/models/test_sample.py",),
        "the fewest tokens that reach a probability",
    ),
    Paper(
        None,
        "adamw",
        "AdamW (Loshchilov and Hutter)",
        2019,
        None,
        ("jaxattn.train.make_optimizer",),
        ("tests/train/test_optimizer.py",),
        "by optax, with decay where it belongs",
    ),
    Paper(
        None,
        "muon",
        "Muon (Jordan et al.)",
        2024,
        None,
        ("jaxattn.train.make_optimizer",),
        ("tests/train/test_optimizer.py",),
        "by optax, for matrices",
    ),
)


def find(name: str) -> Paper | None:
    """The paper of this short name."""
    return next((paper for paper in PAPERS if paper.name == name), None)


def resolve(name: str) -> Any:
    """What a dotted name stands for; raises ImportError or AttributeError if it stands for nothing."""
    package, *rest = name.split(".")
    found: Any = importlib.import_module(package)
    for step, attribute in enumerate(rest):
        if not hasattr(found, attribute):
            importlib.import_module(".".join([package, *rest[: step + 1]]))
        found = getattr(found, attribute)
    return found


def table() -> str:
    """Every paper in Markdown, one a line: number, what it is, what carries it, what checks it, and the note."""
    lines = ["| no. | name | paper | by | checked by | what is there |", "|---|---|---|---|---|---|"]
    for paper in PAPERS:
        parts = ", ".join(f"`{part.removeprefix('jaxattn.')}`" for part in paper.parts)
        checks = ", ".join(check.removeprefix("tests/").removesuffix(".py") for check in paper.checks)
        cells = (str(paper.row or ""), paper.name, paper.cite(), parts, checks, paper.note)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def summary() -> str:
    """The names of all papers in Markdown, by the module that holds the first of their parts."""
    by_module: dict[str, list[str]] = {}
    for paper in PAPERS:
        by_module.setdefault(resolve(paper.parts[0]).__module__, []).append(paper.name)
    lines = ["| in | papers | |", "|---|---|---|"]
    for module, names in sorted(by_module.items()):
        lines.append(f"| `{module.replace('.', '/')}.py` | {len(names)} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/papers.md."""
    listed = sum(paper.row is not None for paper in PAPERS)
    return f"""# Papers

Printed by `python -m jaxattn.papers`. {len(PAPERS)} papers. The {listed} with a number are on the list of those that
this library sets out to cover. A paper without a line is not covered; where only a part of one is, the last column says
which. What a paper claims is measured by [experiments](experiments.md).

{table()}"""


if __name__ == "__main__":
    print(summary() if "--summary" in sys.argv else page(), end="")
