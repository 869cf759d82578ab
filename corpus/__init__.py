"""From text to token shards: documents, tasks, the workers that do the tasks, and the shards."""
