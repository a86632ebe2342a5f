"""The small text-to-image model that ships with attnproc: data, training, loading, metric."""
