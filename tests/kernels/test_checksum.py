import numpy as np
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from dlnlab.kernels.checksum import masked_crc32c


def test_checksum_is_tensorboards():
    data = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()
    for length in (0, 1, 8, 255, 1000):
        assert masked_crc32c(data[:length]) == pywrap_tensorflow.masked_crc32c(data[:length])
