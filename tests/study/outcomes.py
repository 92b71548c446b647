"""Made-up outcomes of runs."""

from nio_hf.study.arms import choose_arms
from nio_hf.study.findings import Findings
from nio_hf.study.plan import Plan
from nio_hf.study.results import Outcome


def plan(**changes):
    """Three arms, two learning rates, two lengths of warmup, three seeds of each kind."""
    settings = {
        "arms": choose_arms(["no_warmup", "warmup", "nio"]),
        "learning_rates": (1e-3, 2e-3),
        "warmup_ratios": (0.1, 0.3),
        "seeds": 3,
        "verdict_seeds": 3,
        "steps": 100,
    }
    return Plan(**{**settings, **changes})


def outcome(value, **changes):
    """The outcome of a run with a value of its metric; None for one that failed."""
    settings = {
        "value": value,
        "eval_loss": None if value is None else 1.0,
        "losses": tuple(2.0 - step / 100 for step in range(100)),
        "grad_norms": (1.0,) * 100,
        "steps": 100,
        "seconds": 1.0,
        "error": "the loss is not finite" if value is None else None,
    }
    return Outcome(**{**settings, **changes})


def findings(made, value, metric, worst, **more):
    """The findings of a comparison of which every run is known."""
    known = {run: outcome(value(run)) for run in made.selection()}
    judged = made.fresh(Findings("recipe", made, known, metric, worst).judged)
    return Findings("recipe", made, known | {run: outcome(value(run)) for run in judged}, metric, worst, **more)
