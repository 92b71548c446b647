"""Image data: data sets, transforms and metrics. It knows nothing of NIO."""
