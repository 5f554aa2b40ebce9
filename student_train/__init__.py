"""Phase 2: cache -> order -> batch -> loss -> trainer -> checkpoint."""
