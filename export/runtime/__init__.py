"""An exported model in ONNX Runtime. Nothing here needs PyTorch."""
