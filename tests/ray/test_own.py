"""What was an argument of `hpo.run` reaches Ray's workers, in trials and in the comparison after them."""

import pytest

pytest.importorskip("ray")

import hpo  # noqa: E402


@pytest.mark.ray
def test_a_metric_that_is_no_module_is_measured_on_the_workers(cluster, tmp_path):
    def brevity(answer, expected, prompt):  # of this function alone: no worker could import it
        return -len(answer)

    study = hpo.run({
        "name": "own", "storage": str(tmp_path),
        "data": {"train": "embedded:train.jsonl", "test": "embedded:test.jsonl", "limit": 16},
        "recipe": {"model": "embedded", "steps": 2, "batch_size": 4, "max_length": 128}, "space": {"rank": [2, 4]},
        "evaluation": {"rows": 8, "test_rows": 8, "reports": 1}, "objectives": ["brevity"], "budget": {"trials": 1},
        "certify": {"extra": 0}, "resources": {"cpus": 1},
    }, metrics={"brevity": brevity})  # fmt: skip
    (trial,) = study.history()
    assert trial.state == "complete", trial.error
    assert trial.outcome.scores["brevity"] <= 0
    assert "brevity" in {one.name for one in study.certificate.metrics}
