from tljh.configurer import load_config

tljh = load_config()
api = tljh["traefik_api"]
scheme = "https" if tljh["https"]["enabled"] else "http"
c.JupyterHub.bind_url = f"{scheme}://:{tljh[scheme]['port']}{tljh['base_url']}"
# not "traefik_toml", which is jupyterhub-traefik-proxy's here
c.JupyterHub.proxy_class = "traefik_toml_proxy.TraefikTomlProxy"
c.TraefikTomlProxy.should_start = False
c.TraefikTomlProxy.toml_static_config_file = "/opt/tljh/state/traefik.toml"
c.TraefikTomlProxy.toml_dynamic_config_file = "/opt/tljh/state/rules/rules.toml"
c.TraefikTomlProxy.traefik_api_url = f"http://127.0.0.1:{api['port']}"
c.TraefikTomlProxy.traefik_api_username = api["username"]
c.TraefikTomlProxy.traefik_api_password = api["password"]
c.TraefikTomlProxy.traefik_entrypoint = scheme
