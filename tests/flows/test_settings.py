from __future__ import annotations

from pathlib import Path

import pytest

from data_contracts.errors import ConfigurationError
from flows.settings import Settings, api_key, documentation, parse_assignment, remembered, resolve, restored


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "other.toml"
    path.write_text(text)
    return path


def test_flags_override_the_file_and_the_file_overrides_what_the_run_was_made_with(empty_folder: Path) -> None:
    file = write(empty_folder, "[train]\nepochs = 7\nbatch_size = 8\n")
    stored = {"train": {"epochs": 3, "batch_size": 4, "dropout": 0.1}}
    settings = resolve(file, {"train.epochs": 9}, stored)
    assert (settings.train.epochs, settings.train.batch_size, settings.train.dropout) == (9, 8, 0.1)


def test_the_file_in_the_current_folder_is_read(empty_folder: Path) -> None:
    (empty_folder / "medmicn.toml").write_text('[source]\nmodality = "chest CT"\n')
    assert resolve(None).source.modality == "chest CT"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nepoch = 7\n", "train.epoch: extra inputs"),
        ("[train]\nepochs = 0\n", "train.epochs: .*got 0"),
        ("[vlm]\nbase_url = 'ftp://x'\n", "vlm.base_url"),
        ("[source]\ntrain_fraction = 0.9\nval_fraction = 0.1\n", "test split remains"),
        ("not toml at all", "expected TOML"),
    ],
)
def test_a_wrong_file_names_the_key_and_what_came(empty_folder: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolve(write(empty_folder, text))


def test_a_missing_file_is_refused(empty_folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="expected a file"):
        resolve(empty_folder / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.epochs=5", ("train.epochs", 5)),
        ("vlm.model=qwen2.5vl:7b", ("vlm.model", "qwen2.5vl:7b")),
        ("train.seeds=[1,2]", ("train.seeds", [1, 2])),
        ("train.freeze_backbone=false", ("train.freeze_backbone", False)),
    ],
)
def test_assignments_are_read_as_toml_or_text(text: str, expected: tuple[str, object]) -> None:
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["epochs=5", "train.epochs", ""])
def test_a_malformed_assignment_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="section.key=value"):
        parse_assignment(text)


def test_the_key_comes_from_the_environment_and_never_stands_in_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    settings = resolve(None, {"vlm.base_url": "http://127.0.0.1:1/v1", "vlm.model": "m", "vlm.api_key_env": "MY_KEY"})
    key = api_key(settings.vlm)
    assert key is not None
    assert key.get_secret_value() == "sk-secret"
    assert "sk-secret" not in settings.model_dump_json()
    assert "sk-secret" not in repr(key)


def test_every_key_is_documented() -> None:
    undocumented = [name for name, _, meaning in documentation() if not meaning]
    assert undocumented == []


def test_a_new_address_does_not_keep_the_model_and_price_of_the_old_one() -> None:
    old = {"vlm.base_url": "http://127.0.0.1:1/v1", "vlm.model": "old", "vlm.concurrency": 3}
    stored = remembered(resolve(None, old))
    new = resolve(None, {"vlm.base_url": "http://127.0.0.1:2/v1", "vlm.model": "new"}, stored)
    assert (new.vlm.model, new.vlm.concurrency) == ("new", 3)
    with pytest.raises(ConfigurationError, match="needs a model name"):
        resolve(None, {"vlm.base_url": "http://127.0.0.1:2/v1"}, stored)
    assert resolve(None, {}, stored).vlm.model == "old"


def test_caps_are_of_one_command_and_not_remembered() -> None:
    capped = resolve(None, {"vlm.max_requests": 5, "vlm.max_cost_usd": 1.0})
    again = resolve(None, {}, remembered(capped))
    assert (again.vlm.max_requests, again.vlm.max_cost_usd) == (None, None)


def test_caps_need_one_process() -> None:
    with pytest.raises(ConfigurationError, match="task_runner"):
        resolve(None, {"vlm.max_requests": 5, "flow.task_runner": "dask"})


def test_witnesses_need_names_of_their_own() -> None:
    same = {"base_url": "http://127.0.0.1:2/v1", "model": "m"}
    with pytest.raises(ConfigurationError, match="every model once"):
        resolve(None, {"vlm.base_url": "http://127.0.0.1:1/v1", "vlm.model": "m", "vlm.also": [same]})
    with pytest.raises(ConfigurationError, match="caps stand under"):
        resolve(None, {"vlm.also": [same | {"max_requests": 3}]})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"vlm.max_cost_usd": -1}, "greater than 0"),
        (
            {"vlm.base_url": "ftp://x/v1", "vlm.model": "m"},
            r"expected 'embedded', 'transformers' or an http\(s\) address",
        ),
        ({"vlm.samples": 5}, "temperature above 0"),
        ({"vlm.batch": True}, "Batch API"),
        ({"vlm.base_url": "http://example.org/v1", "vlm.model": "m", "privacy.offline": True}, "no other machine"),
    ],
)
def test_what_cannot_work_is_refused_in_plain_words(flags: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        resolve(None, flags)
    assert "alue error" not in str(caught.value)
    assert str(caught.value).count("got") <= 1


def test_settings_that_were_resolved_elsewhere_are_not_read_over_by_a_file_that_lies_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside a flow the flags of the command, its caps first of all, stand above the TOML of the folder."""
    (tmp_path / "medmicn.toml").write_text("[vlm]\nmax_requests = 1000\nconcurrency = 64\n")
    monkeypatch.chdir(tmp_path)
    flags = resolve(None, {"vlm.max_requests": 20})
    assert restored(flags.model_dump(mode="json")).vlm.max_requests == 20
    alone = Settings().model_dump(mode="json")
    assert restored(alone) == Settings()
    from flows import annotate_then_train

    assert annotate_then_train._context(str(tmp_path / "run"), alone).settings == Settings()
