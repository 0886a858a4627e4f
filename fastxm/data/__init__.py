"""Captioned pictures: one file a format."""

from fastxm.data.captioned import CaptionedImages as CaptionedImages
from fastxm.data.captioned import open_dataset as open_dataset
from fastxm.data.captioned import prepare as prepare
from fastxm.data.captioned import resizing as resizing
from fastxm.data.features import TextFeatures as TextFeatures
from fastxm.data.features import text_features as text_features
from fastxm.data.sampler import BatchSampler as BatchSampler
