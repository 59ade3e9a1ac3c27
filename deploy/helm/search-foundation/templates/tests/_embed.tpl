{{/* Model of the test: the one given, else the first of the first embedding pool. */}}
{{- define "sf.testModel" -}}
{{- $found := .Values.tests.model -}}
{{- range (include "sf.pools" . | fromYaml).pools -}}
{{- if and (not $found) (has "embed" .capabilities) }}{{ $found = first .models }}{{ end -}}
{{- end -}}
{{- $found -}}
{{- end -}}

{{/* Secret entry with a key for the test; name and key, the name empty when there is none. */}}
{{- define "sf.testKey" -}}
{{- $auth := .Values.auth -}}
{{- if .Values.tests.apiKeySecret.name -}}
{{- toYaml .Values.tests.apiKeySecret -}}
{{- else if and $auth.enabled $auth.bootstrapKey.enabled (not $auth.existingSecret) (not $auth.keys) -}}
{{- dict "name" (printf "%s-bootstrap-key" (include "sf.fullname" .)) "key" "api-key" | toYaml -}}
{{- else -}}
{{- dict "name" "" "key" "" | toYaml -}}
{{- end -}}
{{- end -}}
