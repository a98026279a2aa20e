"""What the configs of all recipes are: fields in a recipe's own words, and the `asyncrl.Config` that they become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from asyncrl.config import Config as EngineConfig
from asyncrl.config import Section, WandbConfig, explain
from asyncrl.errors import ConfigError
from asyncrl.recipes.mapping import ALSO, SETTINGS, Settings, in_these_words, lay_over, nested


class RecipeConfig(Section):
    """Checked when it is made, as what it becomes."""

    wandb: WandbConfig | None = None
    """None: not used."""
    engine: Mapping[str, Any] = {}
    """Settings of `asyncrl.Config` that have no name in this recipe: `{"sampler": {"replicas": 2}}`."""

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None
        self.engine_config()

    def engine_config(self, **more: Any) -> EngineConfig:
        """The same run as an `asyncrl.Config`. `more` are settings of that which only Python has.

        Raises:
            ConfigError: what it refuses, with the names of both.
        """
        settings, fields = self.settings(), self.fields()
        lay_over(settings, self.engine, fields)
        if self.wandb is not None:
            settings["trackers"] = tuple(dict.fromkeys(("wandb", *settings.get("trackers", ()))))
        try:
            return EngineConfig(**(settings | more))
        except ConfigError as error:
            raise ConfigError(in_these_words(str(error), fields)) from None

    def fields(self) -> dict[str, str]:
        """Field of this recipe -> setting of `asyncrl.Config`."""
        return {field: path for field, path in SETTINGS.items() if field.partition(".")[0] in type(self).model_fields}

    def settings(self) -> Settings:
        """Those of `asyncrl.Config` that come from the fields."""
        settings: Settings = {}
        for field, path in self.fields().items():
            name, _, leaf = field.partition(".")
            if not self.is_left_out(name):
                value = getattr(self, name)
                nested(settings, path, getattr(value, leaf) if leaf else value)
        for field, path in ALSO.items():
            if field in type(self).model_fields:
                nested(settings, path, getattr(self, field))
        return settings

    def is_left_out(self, name: str) -> bool:
        """Whether a field leaves its setting to the engine."""
        return getattr(self, name) is None and type(self).model_fields[name].default is None
