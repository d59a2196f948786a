"""The words that figures use for variables and axes: the only place that turns a name into a label."""

import re

import xarray as xr

from dlnlab.results import UNITS, UNOBSERVED

WORDS = {
    # What every model records.
    "train_loss": "training loss",
    "test_loss": "test loss",
    "beta": r"predictor $\beta$",
    "teacher": r"teacher $\beta^*$",
    "step": "optimizer step",
    "step_size": "step size",
    "stopped_at": "step at which it stopped",
    "scheduled_lr": "step size of the schedule",
    "scheduled_weight_decay": "weight decay of the schedule",
    "scheduled_batch_size": "batch size of the schedule",
    "loss_integral": "time integral of the loss",
    "loss_integral_error": "error of the loss integral",
    "converged": "share that has converged",
    "diverged": "share that has diverged",
    # Axes.
    "lr": "step size",
    "init_scale": "init scale",
    "init_on_support": "init on the support, relative",
    "input_mean": "mean of the inputs",
    "noise_std": "noise of the labels",
    "row_scale": "size of the rows",
    # Gain.
    "gain_l1": r"$\ell_1$ norm of the gain",
    "gain_l1_law": "gain, leading order",
    "gain_law": "gain, leading order",
    "gain_plus": r"gain of $w_+$",
    "gain_minus": r"gain of $w_-$",
    "gain_support_ratio": "gain on over off the support",
    "gain_over_formula": "gain over its formula",
    "gain_formula_error": "error of the gain's formula",
    "gain_lower_bound": "lower bound of the gain",
    "gain_upper_bound": "upper bound of the gain",
    "gain_sandwich_error": "error of the gain's bounds",
    "effective_init": "effective initialisation",
    "mean_effective_init": "mean effective initialisation",
    "predicted_effective_init": "effective initialisation by the formula",
    "effective_init_ratio": "effective initialisation over its start",
    "forecast_effective_init_ratio": "forecast of the gradient flow",
    "integrated_loss": "time integral of the loss",
    "imbalance_error": "error of the imbalance's law",
    "mirror_error": "error of the mirror form",
    "gradient_square": "mean squared gradient",
    "gradient_square_law": "mean squared gradient, closed form",
    # Where training ends, beside what theory predicts: relative l2 distances.
    "bregman_error": "rel. distance to the theorem's prediction",
    "bregman_residual": "residual of the theorem's prediction",
    "error_unperturbed": "rel. distance to the theorem without perturbation",
    "error_mean_gain": "rel. distance to the theorem with the mean gain",
    "error_weighted_l1": r"rel. distance to the weighted minimum $\ell_1$",
    "error_gradient_flow": "rel. distance to the end of gradient flow",
    "error_min_l1": r"rel. distance to the minimum $\ell_1$ norm",
    "error_min_l2": r"rel. distance to the minimum $\ell_2$ norm",
    "lasso_error": "rel. distance of the mean to the Lasso",
    "distance_lasso": "squared distance of the Lasso to the teacher",
    "distance_mean": "squared distance of the mean to the teacher",
    "gradient_flow": "gradient flow",
    "min_l1": r"minimum $\ell_1$",
    "min_l2": r"minimum $\ell_2$",
    "min_nuclear": "least nuclear norm",
    "best_nuclear": "nuclear norm, best penalty",
    "true_rank": "least squares at the true rank",
    "l1_norm": r"$\ell_1$ norm of the predictor",
    "support_f1": "F1 score of the support",
    # Curvature.
    "flow_sharpness": "sharpness where gradient flow ends",
    "effective_sharpness": "step size × sharpness",
    "effective_batch_sharpness": "step size × batch sharpness",
    "effective_critical_sharpness": "step size × critical sharpness",
    "sharpness_residual": "residual of the sharpness",
    "sharpness_products": "Hessian-vector products",
    "gauss_newton_sharpness": "Gauss-Newton sharpness",
    "smallest_eigenvalue": "smallest eigenvalue of the Hessian",
    "trace": "trace of the Hessian",
    # Step sizes that theory names.
    "gamma_max": r"$\gamma_{\max}$",
    "gamma_max_first_failure": r"$\gamma_{\max}$, first failure",
    "gamma_max_last_success": r"$\gamma_{\max}$, last success",
    "gamma_max_islands": r"islands above $\gamma_{\max}$",
    "gamma_tilde_max": r"$\tilde\gamma_{\max}$",
    "gamma_tilde_max_first_failure": r"$\tilde\gamma_{\max}$, first failure",
    "gamma_tilde_max_last_success": r"$\tilde\gamma_{\max}$, last success",
    "gamma_tilde_max_islands": r"islands above $\tilde\gamma_{\max}$",
    "gamma_LB": "step size in units of 1/(LB)",
    "flow_edge": "2/sharpness at the flow's end",
    "flattest_edge": "2/sharpness, flattest interpolator",
    "mean_square_edge": "mean-square edge",
    "almost_sure_edge": "almost sure edge",
    # Rank.
    "singular_values": "singular values",
    "jumps_down": "jumps down",
    "jumps_up": "jumps up",
    "in_set": "share in the set",
    "set_exits": "exits from the set",
    "layer_imbalance": "imbalance of the layers",
    "norm_over_least": "squared norm over the least",
    "norm_over_absorbing": "squared norm over the absorbing one",
    # SGD's noise.
    "noise_error": "error of the noise's model",
    "noise_directions": "directions of the noise",
    "model_directions": "directions of the noise's model",
    "noise_trace_ratio": "trace of the noise over the model's",
    # The shallow network.
    "eps": r"residual $\epsilon$",
    "norm_squared": "squared norm",
    "imbalance_ratio": "imbalance over its start",
    "sharpness_over_flow": "sharpness over the flow's",
    "sharpness_over_flattest": "sharpness over the flattest minimum's",
    "contraction_over_bound": "contraction over its bound",
    "contraction_over_leading": "contraction over its first order",
    "steps_to_converge": "steps to converge",
    "rate": "rate of convergence",
    "lyapunov": "Lyapunov exponent",
    # Errors of exact laws, relative to their terms.
    "eps_law_error": "error of the residual's law",
    "norm_squared_law_error": "error of the squared norm's law",
    "imbalance_law_error": "error of the imbalance's law",
    "escape_law_error": "error of the divergence line's law",
    "norm_squared_error": "error of the squared norm's limit",
    "divergence_error": "wrong side of the divergence line",
    "layer_imbalance_error": "error of the layers' imbalance",
    "square_norm_error": "error of the squared norm's law",
    "representation_error": "error of the representation cost",
    "trace_error": "standard error of the trace",
    "batch_sharpness_error": "standard error of the batch sharpness",
}
"""Words for a name where they are not the name itself."""

_DISTANCES = {UNITS["distance"]: "squared distance to the teacher", UNOBSERVED: "error, unobserved entries"}
"""Of `distance`, by its units."""


def words(name: str, data: xr.Dataset | None = None) -> str:
    """The label of a variable, an axis or a variant.

    Args:
        name: Its name in the results.
        data: The results, which tell what their `distance` measures.

    Returns:
        Words for it, of a ratio `a_over_b` those of its parts; for a name that dlnlab does not know, the name with spaces
        for underscores.

    Example:
        >>> words("error_unperturbed"), words("my_variable")
        ('rel. distance to the theorem without perturbation', 'my variable')
    """
    if name == "distance" and data is not None and name in data:
        return _DISTANCES.get(data[name].attrs.get("units"), name)
    if name in WORDS:
        return WORDS[name]
    above, over, below = name.partition("_over_")
    return f"{words(above)} over {words(below)}" if over else re.sub("_+", " ", name).strip()


def wrapped(text: str, width: int = 27) -> str:
    """A label in lines that fit beside a panel.

    Args:
        text: The words, with TeX between dollar signs, which is not divided, and counts about as it is seen.
        width: The characters a line has room for.

    Returns:
        The words with line breaks for spaces.

    Example:
        >>> print(wrapped("squared distance to the teacher"))
        squared distance to the
        teacher
    """
    if text.count("$") % 2:  # no TeX that could be told from the words
        return text
    return "\n".join(line for part in text.split("\n") for line in _lines(part, width))


def _lines(text: str, width: int) -> list[str]:
    found, room = [""], 0
    for word in re.findall(r"(?:\$[^$]*\$|[^ $])+", text):
        seen = len(re.sub(r"\\[a-zA-Z]+|[$_^{}]", lambda part: "x" * part[0].startswith("\\"), word))
        room -= seen + 1
        if room < 0:
            found.append(word)
            room = width - seen
        else:
            found[-1] += f" {word}"
    return found[1:] or [""]
