"""A campaign of bad input: every command, file and public function is refused in a line or few.

No traceback, no silent success, no file left, and each refusal in under a second. What takes less
than seconds is tried by the fast tests too.
"""

import shutil
import sys

import campaign_commands as commands
import campaign_files as files
import campaign_functions as functions
import campaign_models as models
import campaign_ports as ports
import pytest
from campaign import judge, little_memory, special_files

from astraea_jax.checks import Refusal
from astraea_ports import tiny

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="draws FIFOs, devices and signals"),
    pytest.mark.usefixtures("in_an_empty_folder", "as_a_user"),
]


def held(trials, folder, least):
    """Holds every trial against what is due, and says all that failed."""
    with little_memory():
        answers = [judge(trial, folder) for trial in trials]
    faults = [fault for fault in answers if fault is not None]
    print(f"{len(answers)} bad inputs, {len(faults)} answered wrongly")
    assert not faults, f"{len(faults)} of {len(answers)}:\n" + "\n".join(faults)
    assert len(answers) >= least


@pytest.fixture
def model(tmp_path_factory):
    """A copy of the small model, apart from where commands write."""
    folder = tmp_path_factory.mktemp("model") / "wan"
    shutil.copytree(tiny.FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return folder


@pytest.fixture
def apart(tmp_path_factory):
    """A folder apart from where commands write."""
    return tmp_path_factory.mktemp("apart")


@pytest.fixture
def special(tmp_path_factory):
    return special_files(tmp_path_factory.mktemp("special"))


@pytest.mark.slow
def test_words_of_every_command(tmp_path):
    held(commands.word_trials(), tmp_path, least=40)


@pytest.mark.slow
def test_options_of_every_command(tmp_path, special):
    held(commands.option_trials(special), tmp_path, least=600)


@pytest.mark.slow
def test_fields_of_every_config(tmp_path, model):
    held(models.config_trials(model), tmp_path, least=800)
    models.opened(model)


@pytest.mark.slow
def test_what_is_no_file_in_a_model(tmp_path, model, special):
    held(models.model_trials(model, special), tmp_path, least=100)
    models.opened(model)


@pytest.mark.slow
def test_weights_cut_short_and_with_bits_turned(tmp_path, model):
    held(models.all_weight_trials(model), tmp_path, least=140)
    models.opened(model)


@pytest.mark.slow
def test_indices_of_shards(tmp_path, model, special):
    held(models.shard_trials(model, special), tmp_path, least=40)


@pytest.mark.slow
def test_schedule_files(tmp_path, apart, special):
    held(files.schedule_trials(apart, special), tmp_path, least=200)


@pytest.mark.slow
def test_prompts_and_captions(tmp_path, apart, model, special):
    held(files.text_trials(apart, model, special), tmp_path, least=40)


def test_journals(tmp_path, apart, special):
    held(files.journal_trials(apart, special), tmp_path, least=80)


def test_runs_of_a_training(tmp_path, apart, special):
    held(files.run_trials(apart, special), tmp_path, least=30)


def test_what_is_no_video(tmp_path, apart, special):
    held(files.video_trials(apart, special), tmp_path, least=8)


def test_schedules(tmp_path, apart):
    held(functions.schedule_trials(apart), tmp_path, least=300)


def test_solvers_methods_and_operations(tmp_path):
    held(functions.solver_trials(), tmp_path, least=400)


def test_metrics_and_videos(tmp_path, apart, special):
    held(functions.video_trials(apart, special), tmp_path, least=400)


@pytest.mark.slow
def test_attention_loop_and_scorer(tmp_path):
    held(functions.core_trials(), tmp_path, least=250)


def test_spaces(tmp_path):
    held(functions.space_trials(), tmp_path, least=150)


def test_searches(tmp_path, special):
    held(functions.search_trials(special), tmp_path, least=250)


@pytest.mark.slow
def test_what_loads_a_model(tmp_path, special):
    held(ports.port_trials(special), tmp_path, least=350)


@pytest.mark.slow
def test_a_call_of_a_pipeline(tmp_path):
    held(ports.call_trials(), tmp_path, least=200)


def test_a_refusal_is_a_value_error():
    assert issubclass(Refusal, ValueError)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
