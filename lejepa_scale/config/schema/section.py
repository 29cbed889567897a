"""What every section is made of, and the kinds of values that several have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, WrapValidator

from lejepa_scale.config.words import steps_or_words

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
# An int of steps, or words (a str) that durations.in_steps makes steps of once the data is opened: what reads it sees steps.
AsItIs = PlainSerializer(lambda value: value, return_type=int | str | None)
Duration = Annotated[Positive, WrapValidator(steps_or_words), AsItIs]
DurationOrZero = Annotated[NonNegative, WrapValidator(steps_or_words), AsItIs]
FilePath = Annotated[Path, AfterValidator(Path.expanduser)]  # `~` is the home folder, which a shell leaves in key=~/a


class Section(BaseModel):
    """A strict group of keys: an unknown one is refused. Python writes `global_` and `lambda_`, a file does not."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_by_name=True, validate_by_alias=True
    )
