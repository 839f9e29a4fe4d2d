"""The steps of `influence` on a Ray cluster: a pool of replica actors, a reducer actor, jobs."""
