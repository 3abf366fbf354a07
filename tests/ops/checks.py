# SPDX-License-Identifier: Apache-2.0
"""All checks: importing this adds those that no user runs to `sparse_unified.checks`."""

import checks_experts
import checks_routing
import checks_torch

__all__ = ["checks_experts", "checks_routing", "checks_torch"]
