import subprocess
import sys


def test_sources_without_kernels_say_so():
    code = "import sys; sys.modules['fastxm._C'] = None; import fastxm.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode
    assert "ImportError: fastxm._C is not here: install fastxm" in done.stderr
