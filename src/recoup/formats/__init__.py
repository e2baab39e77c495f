"""Number formats: what a value becomes in floating point, integers and block floating point, bit for bit."""

from recoup.formats.codes import BlockCodes, FloatFields, code_bits, decode, encode
from recoup.formats.ops import quantize
from recoup.formats.spec import BlockFloat, Float, Int

__all__ = ["BlockCodes", "BlockFloat", "Float", "FloatFields", "Int", "code_bits", "decode", "encode", "quantize"]
