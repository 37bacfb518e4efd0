"""Types of the JSON responses. The functions that build a response return one of them; the OpenAPI document has all."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

STATUSES = ["starting", "processing", "succeeded", "failed", "canceled"]
JobStatus = Annotated[str, Field(json_schema_extra={"enum": [*STATUSES]})]
Seconds = Annotated[float | None, Field(description="Seconds since 1970-01-01 UTC.")]
Time = Annotated[str | None, Field(description="ISO 8601, UTC.")]
Link = Annotated[str | None, Field(description="Signed link, valid for one hour; read the job again for a new one.")]
Metrics = Annotated[dict[str, Any], Field(description="Times, tiles, seed and memory of the run.")]
Values = Annotated[dict[str, Any], Field(description="The settings of the job, with its seed.")]


class Error(TypedDict):
    """Every error of every route has this form."""

    code: Annotated[str, Field(description="Stable name of the error.")]
    title: Annotated[str, Field(description="Name of the HTTP status.")]
    detail: Annotated[str, Field(description="What was wrong with which value, the limit, and the next step.")]
    status: Annotated[int, Field(description="HTTP status.")]
    field: Annotated[str | None, Field(description="Field of the request to change.")]
    setting: Annotated[str | None, Field(description="Environment variable of the server that changes the limit.")]
    quote: NotRequired[Annotated[dict[str, Any], Field(description="With `deadline_too_short`: what was expected.")]]


class Quote(TypedDict):
    """What an image should take and give on this server."""

    output_size: Annotated[str, Field(description="WIDTHxHEIGHT of the whole output, pixels.")]
    tiles: Annotated[int, Field(description="Tiles that the denoiser computes, of all steps.")]
    seconds: Annotated[float | None, Field(description="Without waiting; null: no image was measured.")]
    seconds_at_most: Annotated[float | None, Field(description="What the latest images did not exceed.")]
    bytes: Annotated[int | None, Field(description="Size of the file; null: no file of its format was measured.")]
    peak_memory_mb: Annotated[dict[str, int], Field(description="Most memory of the process: host, device.")]
    price: Annotated[float | None, Field(description="Of `seconds`, at the server's price per hour.")]
    images: Annotated[int, Field(description="Images that were measured on this machine.")]
    wait: Annotated[float, Field(description="Seconds in the queue.")]
    promised: Annotated[float | None, Field(description="Shortest deadline that is accepted; null: every one.")]
    meets_deadline: Annotated[bool | None, Field(description="Whether `deadline` is accepted; null without one.")]


class JobUrls(TypedDict):
    self: str
    events: str
    result: str


class Job(TypedDict):
    """One image."""

    id: str
    status: JobStatus
    name: Annotated[str, Field(description="Name of the file that was sent.")]
    stage: Annotated[str, Field(description="What runs now: read, tags, text, enlarge, encode, denoise, decode, ...")]
    done: Annotated[int, Field(description="Finished parts of the stage.")]
    total: Annotated[int, Field(description="Parts of the stage.")]
    progress: Annotated[float, Field(description="Finished share of the whole job, 0 to 1.")]
    seconds_left: Annotated[float | None, Field(description="Estimate for the rest of the job.")]
    ahead: Annotated[int | None, Field(description="GET /jobs/{id} of a waiting job: jobs of all keys before it.")]
    error: Annotated[str | None, Field(description="Why the job failed.")]
    settings: Values
    metrics: Metrics
    created: Seconds
    started: Seconds
    completed: Seconds
    result: Link
    urls: JobUrls


class ResultLink(TypedDict):
    """A link in place of the file."""

    file_key: str | None
    public_url: Link


class RefusedFile(TypedDict):
    """A file of a batch for which there is no job."""

    name: str
    code: Annotated[str, Field(description="Stable name of the error.")]
    error: str


class BatchUrls(TypedDict):
    self: str


class NewBatch(TypedDict):
    """A batch that was queued."""

    id: str
    jobs: list[Job]
    refused: list[RefusedFile]
    urls: BatchUrls


class Batch(TypedDict):
    """A batch as it is now."""

    id: str
    status: Literal["processing", "ended"]
    jobs: list[Job]
    refused: list[RefusedFile]
    result: Annotated[str | None, Field(description="Address of the zip of results, once every job has ended.")]


class PredictionUrls(TypedDict):
    get: str
    cancel: str
    stream: str
    web: str


class Prediction(TypedDict):
    """A job in Replicate's form."""

    id: str
    model: str
    version: str
    input: dict[str, Any]
    logs: str
    output: Annotated[str | None, Field(description="Over https a signed link, over http a data URI.")]
    data_removed: bool
    error: str | None
    status: JobStatus
    source: str
    metrics: Metrics
    created_at: Time
    started_at: Time
    completed_at: Time
    urls: PredictionUrls


class Predictions(TypedDict):
    """One page of predictions, newest first."""

    previous: str | None
    next: str | None
    results: list[Prediction]


class Version(TypedDict):
    id: str
    created_at: Time
    cog_version: str
    openapi_schema: dict[str, Any]


class Versions(TypedDict):
    previous: str | None
    next: str | None
    results: list[Version]


class Model(TypedDict):
    owner: str
    name: str
    description: str
    visibility: str
    url: str
    cover_image_url: str | None
    default_example: dict[str, Any] | None
    run_count: int
    latest_version: Version


class WebhookSecret(TypedDict):
    key: Annotated[str, Field(description="whsec_ and the secret in base64.")]


class FileUrls(TypedDict):
    get: str


class File(TypedDict):
    """An uploaded file."""

    id: str
    name: str
    content_type: str
    size: int
    etag: str
    checksums: dict[str, str]
    metadata: dict[str, Any]
    created_at: Time
    expires_at: Time
    urls: FileUrls


class Files(TypedDict):
    previous: str | None
    next: str | None
    results: list[File]


class InferenceResult(TypedDict):
    """An upscaled image in base64, as Hugging Face, SageMaker and Vertex AI take it."""

    image: str
    format: str
    seed: int
    metrics: Metrics


class InferenceResults(TypedDict):
    predictions: list[InferenceResult]


class Day(TypedDict):
    """What a key used on one UTC day."""

    day: str
    images: int
    megapixels: float


class Usage(TypedDict):
    """Limits and use of the key that asks."""

    name: str
    rate: Annotated[int, Field(description="POST requests a minute.")]
    share: Annotated[float, Field(description="Largest share of the queue while others wait.")]
    priorities: list[str]
    megapixels_per_day: float | None
    expires: str | None
    days: Annotated[list[Day], Field(description="Newest first; the last 40 days.")]


class Description(TypedDict):
    """The settings, presets and limits of the server, for user interfaces."""

    fields: list[dict[str, Any]]
    presets: dict[str, Any]
    limits: dict[str, Any]
