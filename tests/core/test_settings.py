"""Settings: variables over YAML over defaults, and a sentence for everything that is wrong."""

from pathlib import Path

import pytest

from services.core.settings import ConfigurationError, load_settings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("SF_"):
            monkeypatch.delenv(name)


def test_defaults_need_nothing() -> None:
    settings = load_settings()
    assert settings.models == ("all-MiniLM-L6-v2",)
    assert settings.host == "127.0.0.1"


def test_variables_win_over_yaml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "sf.yaml"
    file.write_text("http_port: 9000\ngrpc_port: 9001\nmodels: [a, b]\n")
    monkeypatch.setenv("SF_HTTP_PORT", "9100")
    settings = load_settings(file)
    assert (settings.http_port, settings.grpc_port, settings.models) == (9100, 9001, ("a", "b"))


@pytest.mark.parametrize("value", ["a,b", " a , b,", '["a", "b"]'])
def test_lists_are_read_as_they_are_typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    monkeypatch.setenv("SF_MODELS", value)
    monkeypatch.setenv("SF_BATCH_MODELS", value)
    monkeypatch.setenv("SF_TRUSTED_PROXIES", "10.0.0.0/8,::1/128")
    settings = load_settings()
    assert settings.models == settings.batch_models == ("a", "b")
    assert list(map(str, settings.trusted_proxies)) == ["10.0.0.0/8", "::1/128"]
    monkeypatch.delenv("SF_MODELS")
    file = tmp_path / "sf.yaml"
    file.write_text("models: a, b\n")
    assert load_settings(file).models == ("a", "b")


def test_the_file_may_be_named_by_a_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "sf.yaml"
    file.write_text("http_port: 9000\n")
    monkeypatch.setenv("SF_CONFIG", str(file))
    assert load_settings().http_port == 9000


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("SF_HTPP_PORT", "1", "Unknown setting SF_HTPP_PORT. Did you mean SF_HTTP_PORT?"),
        ("SF_HTTP_PORT", "seventy", "SF_HTTP_PORT: Input should be a valid integer"),
        ("SF_HTTP_PORT", "70000", "SF_HTTP_PORT: Input should be less than or equal to 65535"),
        ("SF_DTYPE", "float16", "SF_DTYPE: Input should be 'auto', 'float32' or 'bfloat16'"),
        ("SF_MODELS", "[a", 'SF_MODELS: not a list, as a,b or ["a", "b"]'),
        ("SF_MODELS", " , ", "SF_MODELS: Tuple should have at least 1 item"),
        ("SF_TRUSTED_PROXIES", "10.0.0.0/8,house", "SF_TRUSTED_PROXIES.1: value is not a valid IPv4"),
        ("SF_MODEL_ALIASES", "a=b", "SF_MODEL_ALIASES: not a JSON object (Expecting value"),
        ("SF_TLS_CERT", "/cert.pem", "SF_TLS_CERT and SF_TLS_KEY go together"),
        ("SF_DEFAULT_TIER", "gold", "default_tier 'gold' is not one of the tiers"),
    ],
)
def test_wrong_variables_are_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as error:
        load_settings()
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("htpp_port: 1", "unknown setting 'htpp_port'"),
        ("- a\n- b", "must hold a mapping"),
        ("a: [", "Cannot read the settings file"),
    ],
)
def test_wrong_files_are_explained(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "sf.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as error:
        load_settings(file)
    assert sentence in str(error.value)


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Cannot read the settings file"):
        load_settings(tmp_path / "none.yaml")


def test_secrets_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_REDIS_URL", "redis://:hunter2@host")
    assert "hunter2" not in repr(load_settings())
