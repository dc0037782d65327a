"""The environment variables. When Hayhooks starts, it also loads `.env`."""

from typing import Any

from haystack.utils import Secret
from pydantic import Field, HttpUrl
from pydantic_settings import BaseSettings, SettingsConfigDict

# An empty variable counts as unset. Without `hide_input_in_errors`, a mistyped key would be in the log.
CONFIG = SettingsConfigDict(env_ignore_empty=True, str_strip_whitespace=True, hide_input_in_errors=True)


class Limits(BaseSettings):
    """The limit on clients of each pipeline in each worker; raises ValueError for an invalid variable."""

    model_config = CONFIG
    MAX_CONCURRENT_STREAMS: int = Field(500, ge=1, le=1000)  # OpenAI's SDK opens at most 1000 connections


class Settings(BaseSettings):
    """The upstream of an OpenAIGenerator; raises ValueError for a missing or invalid variable."""

    model_config = CONFIG
    OPENAI_API_KEY: str = Field(pattern="^[!-~]+$")  # what an HTTP header can carry
    OPENAI_MODEL: str = Field("gpt-5-mini", min_length=1)
    OPENAI_BASE_URL: HttpUrl = HttpUrl("https://api.openai.com/v1")
    OPENAI_TIMEOUT: float = Field(120, gt=0, le=3600)  # seconds without a byte from the upstream
    OPENAI_MAX_RETRIES: int = Field(0, ge=0, le=10)  # before each retry the SDK sleeps, and so blocks a thread

    def openai_arguments(self) -> dict[str, Any]:
        """Return the arguments with which to create an OpenAIGenerator."""
        return {
            "api_key": Secret.from_token(self.OPENAI_API_KEY),
            "model": self.OPENAI_MODEL,  # the `model` in a request names the pipeline
            "api_base_url": str(self.OPENAI_BASE_URL),
            "timeout": self.OPENAI_TIMEOUT,
            "max_retries": self.OPENAI_MAX_RETRIES,
        }
