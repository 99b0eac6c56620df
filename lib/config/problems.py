"""The three problems that a model is trained for, in transformers' words, and how each is usually scored."""

CLASSIFICATION = "single_label_classification"
REGRESSION = "regression"
MULTI_LABEL = "multi_label_classification"

USUAL_METRICS = {
    CLASSIFICATION: ("accuracy", "f1_macro"),
    REGRESSION: ("pearson", "spearman", "mse"),
    # The first one chooses the model: average precision needs no thresholds.
    MULTI_LABEL: ("average_precision", "f1_micro", "f1_macro"),
}
OWN_METRICS = {
    CLASSIFICATION: ("accuracy", "cohen_kappa", "f1", "matthews_correlation", "precision", "recall"),
    REGRESSION: ("mae", "mse", "pearson", "r2", "spearman"),
    MULTI_LABEL: ("accuracy", "average_precision", "f1", "precision", "recall"),
}
"""Modules of lib/evaluation/metrics by the problem they are for; a module that is in no row is for all of them."""

LOWER_IS_BETTER = ("loss", "mae", "mse")


def words(problem_type: str) -> str:
    """How a problem is called in messages."""
    return problem_type.replace("_", "-").replace("-classification", " classification")
