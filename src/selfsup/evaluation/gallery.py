"""What people look at after a pre-training: pictures, sounds and series that it never saw.

A gallery is a list of panels; pictures.json holds it, and the report shows it. A panel has

- `title`, and `lead`: one sentence on how to read it,
- `columns`: their names, or nothing,
- `rows` of cells. A cell is a dictionary with one or two of these keys:

| key           | value                                                                        |
|---------------|------------------------------------------------------------------------------|
| `png`         | a small picture: PNG, as a data URI                                          |
| `spectrogram` | the same for a sound: time to the right, low frequencies at the bottom       |
| `wav`         | the sound itself: 16-bit mono, as a data URI                                 |
| `series`      | numbers of one channel, drawn by the report: see `gallery_series.py`         |

What a method can show is known by its protocols (`objective.py`), never by its name.
"""

from selfsup.batch import AudioSpec, ImageSpec, SeriesSpec
from selfsup.data.dataset import Dataset
from selfsup.evaluation.gallery_audio import audio_panels
from selfsup.evaluation.gallery_image import image_panels
from selfsup.evaluation.gallery_parts import Panel
from selfsup.evaluation.gallery_series import series_panels
from selfsup.model import Model


def gallery(model: Model, held_out: Dataset) -> list[Panel]:
    """Panels about a model of pictures, sound or series; empty for other kinds of data."""
    match model.preprocessor.spec:
        case ImageSpec() as spec:
            return image_panels(model, held_out, spec)
        case AudioSpec() as spec:
            return audio_panels(model, held_out, spec)
        case SeriesSpec() as spec:
            return series_panels(model, held_out, spec)
    return []
