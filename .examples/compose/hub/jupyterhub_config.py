# Add what your spawner and authenticator need.
c.JupyterHub.proxy_class = "traefik_toml"
c.TraefikTomlProxy.should_start = False
c.TraefikTomlProxy.traefik_api_username = "api_admin"
c.TraefikTomlProxy.traefik_api_password = "admin"  # a long random one, please
c.TraefikTomlProxy.toml_dynamic_config_file = "/srv/rules/rules.toml"
