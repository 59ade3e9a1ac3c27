{{/* Scaling behaviour, in the words both autoscalers use. */}}
{{- define "sf.scalingBehavior" -}}
scaleUp:
  stabilizationWindowSeconds: {{ .scaleUp.stabilizationSeconds }}
  policies:
    - type: Pods
      value: {{ .scaleUp.podsPerMinute }}
      periodSeconds: 60
scaleDown:
  stabilizationWindowSeconds: {{ .scaleDown.stabilizationSeconds }}
  policies:
    - type: Pods
      value: {{ .scaleDown.podsPerFiveMinutes }}
      periodSeconds: 300
{{- end -}}
