"""The metrics that trainings are judged by."""

import math

from nio_hf.metrics import ACCURACY, LOSS


def test_more_accuracy_and_less_loss_are_better():
    assert ACCURACY.gain(60.0, 50.0) == 10.0
    assert LOSS.gain(2.0, 3.5) == 1.5


def test_a_model_that_knows_nothing_chooses_at_random():
    assert ACCURACY.worst(10) == 10.0
    assert LOSS.worst(1000) == math.log(1000)


def test_a_metric_in_words():
    assert (ACCURACY.label, ACCURACY.heading) == ("accuracy (%)", "Accuracy (%)")
    assert (LOSS.label, LOSS.heading) == ("evaluation loss (nats)", "Evaluation loss (nats)")
    assert (ACCURACY.text(51.234), LOSS.text(2.34567)) == ("51.23%", "2.3457")
