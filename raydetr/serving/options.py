"""What a server is started with: the checkpoint, how predictions are made, and the limits on what users send."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

UNPACKED = 4  # a zip may unpack to so many times the largest upload; photographs hardly shrink in a zip
MOST_ENTRIES = 10  # for each image that is allowed in a zip: folders and the notes that systems leave beside files
RETRY_AFTER_S = 1

Positive = Annotated[int, Field(ge=1)]


class Options(BaseModel):
    """What a server is started with; also the arguments of an application in a configuration file of Ray Serve.

    Attributes:
        checkpoint: Path or URL of the checkpoint.
        replicas: Number of processes that predict.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        cpus: CPU cores of each replica.
        gpus: GPUs of each replica, also a fraction; None: one if the cluster has any and ``device`` is not ``"cpu"``.
        batch_size: Largest number of images, or parts of images, in a batch. On CPUs a replica predicts two batches at a time.
        queue: Number of requests that may wait while all replicas are busy; further ones are answered with 503.
        threshold: Lowest score of a detection that is returned; None: those of the checkpoint, else 0.7.
        tiles: Columns and rows such as ``"2x2"`` to predict on parts of the images as well; None for the whole image alone.
        overlap: Overlap of neighboring tiles, a fraction of a tile; None for the default.
        max_megabytes: Largest upload.
        max_megapixels: Largest image.
        max_images: Largest number of images in one request.
        timeout_s: How long an upload may take, and how long its prediction may, in seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str
    replicas: Positive = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus: Positive = 1
    gpus: Annotated[float, Field(ge=0)] | None = None
    batch_size: Positive = 4
    queue: Annotated[int, Field(ge=0)] = 32
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    tiles: str | None = None
    overlap: float | None = None
    max_megabytes: Positive = 32
    max_megapixels: Positive = 50
    max_images: Positive = 64
    timeout_s: Annotated[float, Field(gt=0)] = 60.0

    @property
    def max_bytes(self) -> int:
        """The largest upload in bytes."""
        return self.max_megabytes * 1_000_000

    @property
    def ongoing(self) -> int:
        """Number of requests that a replica works on at a time: those of two batches, and of the next one, which are decoded meanwhile."""
        return 3 * self.batch_size

    @property
    def most_requests(self) -> int:
        """Number of requests for predictions that are taken in at a time, by all replicas and the queue."""
        return self.replicas * self.ongoing + self.queue
