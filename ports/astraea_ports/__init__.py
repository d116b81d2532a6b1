"""Models for astraea_jax: Wan 2.1 and a small trained Wan that ships."""
