"""HTML pages: what renders them, and the layout they share (``templates/``)."""

import jinja2

GENERATOR = "raydetr"  # marks a page as one of raydetr's, which may be overwritten


def page_environment(*packages: str) -> jinja2.Environment:
    """Return what renders the templates of some packages, which may extend ``page.html`` and include ``cards.html``. All text is escaped.

    Args:
        *packages: Dotted names of the packages that have the templates.
    """
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader("raydetr"), *(jinja2.PackageLoader(package, "") for package in packages)])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.globals["generator"] = GENERATOR
    return environment
