"""How hypothesis draws examples: the same ones in every run."""

from hypothesis import HealthCheck, Phase, settings


def examples(count):
    """At most `count` examples, whatever time they take; one that fails is shown as it was found."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
