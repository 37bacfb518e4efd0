"""Request models (pydantic, one per route) and one-line validation errors."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import core_schema, from_json
from starlette.datastructures import UploadFile
from starlette.requests import Request

from seesr.serving.refusal import Refused, shown
from seesr.settings import Settings
from seesr.settings.parsing import settings_of
from seesr.settings.validation import FieldError

LONGEST_WAIT = 600.0  # seconds
LONGEST_DEADLINE = 1e6  # seconds
JSON_TYPES = ("application/json",)
T = TypeVar("T", bound=BaseModel)
URI = {"type": "string", "format": "uri", "description": "A data URI, an http(s) URL or the URL of an upload."}
Image = Annotated[Any, WithJsonSchema(URI)]  # or an uploaded file or a stream of bytes: uploads.py takes it


class Between(NamedTuple):
    """Refuses numbers outside a range, with the range in the message and in the schema."""

    minimum: float
    maximum: float

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        return {**handler(schema), "minimum": self.minimum, "maximum": self.maximum}

    def check(self, value: float) -> float:
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"it must be from {self.minimum:g} to {self.maximum:g}")
        return value


class Body(BaseModel):
    """A request's values. Empty fields of a form, and null, count as not given."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def without_empty(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name not in cls.model_fields or not is_empty(value)}


class JobRequest(Body):
    """How a job is to be run. What else is named are its settings."""

    model_config = ConfigDict(extra="allow")

    priority: Literal["urgent", "normal", "low"] = "normal"
    deadline: Annotated[float, Between(0.001, LONGEST_DEADLINE)] | None = None

    def settings(self) -> Settings:
        """The settings among the values.

        Raises:
            ValueError: an unknown name, or a value outside its range; one line.
        """
        return settings_of(self.model_extra or {})

    def options(self) -> dict[str, Any]:
        """Priority and deadline."""
        return {"priority": self.priority, "deadline": self.deadline}


class UpscaleRequest(JobRequest):
    """POST /upscale: query, form or JSON."""

    image: Image = None
    mask: Image = None
    wait: Annotated[float, Between(0, LONGEST_WAIT)] = 60.0
    answer: Literal["file", "link"] = "file"


class BatchRequest(JobRequest):
    """POST /batches: query and form."""

    image: Image = None
    wait: Any = None  # a batch is not waited for
    answer: Any = None


class PredictionRequest(Body):
    """POST /v1/predictions."""

    version: str | None = None
    input: dict[str, Any]
    webhook: Any = None  # webhooks.py checks it
    webhook_events_filter: list[Literal["start", "output", "logs", "completed"]] | None = None


class Input(Body):
    """`input` of a prediction."""

    model_config = ConfigDict(extra="allow")

    image: Image
    mask: Image = None


class HuggingFaceRequest(Body):
    """POST / of an inference endpoint."""

    inputs: str
    parameters: dict[str, Any] = {}


class Instance(BaseModel):
    """One image of a Vertex request."""

    image: str


class VertexRequest(Body):
    """POST of Vertex's prediction route."""

    instances: list[Instance] = Field(min_length=1, max_length=100)
    parameters: dict[str, Any] = {}


class Parameters(Body):
    """`parameters` of Hugging Face and Vertex: settings, and a mask."""

    model_config = ConfigDict(extra="allow")

    mask: Image = None


class Upload(Body):
    """POST /v1/files beside its file."""

    metadata: dict[str, Any] = {}


def is_empty(value: Any) -> bool:
    """Whether a field was left empty: null, no text, or a file part without bytes."""
    return value is None or value == "" or (isinstance(value, UploadFile) and value.size == 0)


def parse(model: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """The values as a model.

    Args:
        prefix: of the names in the message, such as "input.".

    Raises:
        FieldError: the first fault: which value, and what it must be; one line.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise FieldError(prefix + sentence(error), location(error)) from None


def location(error: ValidationError) -> str:
    """The name of the first faulty value, such as input.image."""
    return ".".join(str(part) for part in error.errors(include_url=False)[0]["loc"])


def sentence(error: ValidationError) -> str:
    """The first fault of a request in one line."""
    fault = error.errors(include_url=False)[0]
    name = location(error)
    if fault["type"] == "missing":
        return f"{name} is required"
    if fault["type"] == "literal_error":
        choices = str(fault.get("ctx", {}).get("expected")).replace("'", "").replace(" or ", ", ")
        return f"{name} is {reprlib.repr(fault['input'])}; it must be one of {choices}"
    message = fault["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    message = message.replace("a valid dictionary", "an object").replace("a valid ", "a ").partition(",")[0]
    return f"{name} is {shown(fault['input'])}; {message}"


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text: no NaN, no half of a surrogate pair, 200 levels at most.

    Raises:
        ValueError: it is no such text; one line.
    """
    return from_json(data, allow_inf_nan=False)


def is_json(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith(JSON_TYPES)


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object; the middleware limits its size.

    Raises:
        Refused: it is not sent as JSON, or is no JSON object.
    """
    if not is_json(request):  # a page of another site cannot send this type without asking first
        raise Refused("unsupported_media_type", "send a JSON object with Content-Type: application/json")
    try:
        value = parse_json(await request.body())
    except ValueError as error:
        raise Refused("invalid_body", f"the body is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise Refused("invalid_body", "the body must be a JSON object")
    return value
