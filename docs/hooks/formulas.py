"""The pages of the functions, as data: which functions stand on one, their formula, and what a call must move and compute at the least.

A cost that `tests/bench/table.py` counts is taken from there; `cost` says it for the others.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """One page of functions: its name, the functions, their formulas in LaTeX, and costs that the benchmarks do not count."""

    name: str
    functions: tuple[str, ...]
    formulas: tuple[str, ...]
    cost: str = ""


HEAD = (
    "With N tokens, hidden size H and vocabulary V: the matrix products are 2·N·H·V FLOPs each, one in forward, two more for the "
    "gradients of x and weight. Logits exist a chunk of tokens at a time, never all N·V of them."
)

PAGES = (
    Page("rms_norm", ("rms_norm",), (
        r"r = \frac{1}{\sqrt{\frac{1}{H}\sum_i x_i^2 + \epsilon}}, \qquad y = x \, r \, (w + o)",
        r"g = dy\,(w + o), \qquad dx = r\,g - x\,r^3\,\frac{1}{H}\sum_i g_i x_i, \qquad dw = \sum_{rows} dy \, x \, r",
    )),
    Page("add_rms_norm", ("add_rms_norm",), (
        r"s = x + residual, \qquad y = \frac{s}{\sqrt{\frac{1}{H}\sum_i s_i^2 + \epsilon}} \, (w + o)",
    )),
    Page("layer_norm", ("layer_norm",), (
        r"\mu = \frac{1}{H}\sum_i x_i, \qquad y = \frac{x - \mu}{\sqrt{\frac{1}{H}\sum_i (x_i - \mu)^2 + \epsilon}} \, w + b",
    )),
    Page("group_norm", ("group_norm",), (
        r"y_{n c \cdot} = \frac{x_{n c \cdot} - \mu_{n g}}{\sqrt{\sigma_{n g}^2 + \epsilon}} \, w_c + b_c",
                r"g = \left\lfloor c \, G / C \right\rfloor",
    )),
    Page("glu", ("swiglu", "geglu", "reglu", "swiglu_packed", "geglu_packed"), (
        r"y = act(gate) \cdot up, \qquad silu(a) = \frac{a}{1 + e^{-a}}, \quad gelu(a) = a\,\Phi(a), \quad relu(a) = \max(a, 0)",
        r"dup = dy \cdot act(gate), \qquad dgate = dy \cdot up \cdot act'(gate)",
    )),
    Page("relu_squared", ("relu_squared",), (r"y = \max(x, 0)^2, \qquad dx = 2\,\max(x, 0)\,dy",)),
    Page("swiglu_mlp", ("swiglu_mlp",), (r"y = \left( silu(x W_{gate}^T) \cdot x W_{up}^T \right) W_{down}^T",)),
    Page("rope", ("rope", "rope_complex"), (
        r"\begin{pmatrix} q'_1 \\ q'_2 \end{pmatrix} = "
                r"\begin{pmatrix} \cos\theta & -\sin\theta \\ \sin\theta & \cos\theta \end{pmatrix} "
                r"\begin{pmatrix} q_1 \\ q_2 \end{pmatrix}",
        r"\langle R_m q, R_n k \rangle = \langle R_{m-n} q, k \rangle, \qquad dq = R^T dq'",
    )),
    Page("softmax", ("softmax",), (
        r"y_i = \frac{e^{x_i - \max x}}{\sum_j e^{x_j - \max x}}, \qquad dx = y\,(dy - \sum_j y_j\,dy_j)",
    )),
    Page("cross_entropy", ("cross_entropy",), (
        r"\ell = \log\sum_j e^{z_j} - z_t, \qquad \frac{\partial \ell}{\partial z_j} = softmax(z)_j - [j = t]",
    )),
    Page("linear_cross_entropy", ("linear_cross_entropy",), (
        r"z = x W^T + b, \qquad \ell = \log\sum_j e^{z_j} - z_t",
        r"dz = softmax(z) - onehot(t), \qquad dx = dz\,W, \qquad dW = dz^T x",
    ), HEAD),
    Page("linear_log_prob", ("linear_log_prob",), (r"\log p(t \mid x) = z_t - \log\sum_j e^{z_j}, \qquad z = x W^T + b",),
        HEAD + " Backward computes the logits of each chunk again: four products in all."),
    Page("linear_distill", ("linear_distill",), (
        r"p = softmax(x_T W_T^T / \tau), \quad q = softmax(x W^T / \tau), \qquad \ell = D(p, q)",
    ), HEAD + " The teacher's product is one more."),
    Page("moe_router", ("moe_router",), (r"index = topk_k(score(logits) + bias), \qquad weight = scale \cdot normalize(score_{index})",),
        "Reads the logits once and writes k numbers and k indices a token."),
    Page("moe_experts", ("moe_experts", "expert_parallel_moe_experts"), (
        r"y = \sum_{j=1}^{k} w_j \, E_{i_j}(x), \qquad E(x) = \left( act(x G^T) \cdot x U^T \right) D^T",
    ), "With T tokens, k experts of each, hidden size H and inner size I: 6·T·k·H·I FLOPs in forward and twice as many in backward."),
    Page("moe_permute", ("moe_permute", "moe_unpermute"), (r"rows_r = x_{token(r)}, \qquad y_t = \sum_j w_{t j} \, rows_{place(t, j)}",),
        "Writes k rows for each that it reads, and back."),
    Page("moe_losses", ("moe_load_balancing_loss", "moe_z_loss"), (
        r"L_{balance} = E \sum_e f_e \, P_e, \qquad L_z = \frac{1}{T} \sum_t \left( \log\sum_e e^{z_{t e}} \right)^2",
    ), "Reads the router's logits once."),
    Page("vocab_parallel", (
        "vocab_parallel_linear_cross_entropy", "vocab_parallel_linear_log_prob", "vocab_parallel_linear_distill"), (
        r"\log\sum_j e^{z_j} = \log\sum_{ranks} e^{lse_{rank}}, \qquad z_t = \sum_{ranks} [t \in rank]\, z_t",
    ), HEAD + " On each rank V is its share of the vocabulary; sums of each row cross the ranks, and dx is summed over them."),
    Page("backends", ("backend", "use_backend"), (), ),
)  # fmt: skip
