"""Text on its way to ids: documents, jobs, the workers that do the jobs, shards, and examples."""
