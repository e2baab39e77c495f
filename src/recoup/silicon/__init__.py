"""Hardware from the configs that drive the emulation: Verilog, proof of equality, area, delay, energy.

rc.silicon.build(rc.NBSMT(threads=2)).verify()
"""

from recoup.silicon.area import Area
from recoup.silicon.energy import Energy
from recoup.silicon.generate import build
from recoup.silicon.measured import Measured
from recoup.silicon.operands import capture
from recoup.silicon.timing import Delay
from recoup.silicon.verify import Counterexample, Verification

__all__ = ["Area", "Counterexample", "Delay", "Energy", "Measured", "Verification", "build", "capture"]
