# SPDX-License-Identifier: Apache-2.0
"""The version of the package, where every module may import it from."""

__version__ = "0.1.0"
